"""The detector itself: it finds what waits for a device, and leaves alone what does not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sync_detector import DeviceWait, no_device_wait

X = torch.arange(12.0).view(3, 4)
N = torch.tensor([0, 2, 1])
DEVICE = X.device

WAITS = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(X.sum() > 3),
    "int": lambda: int(N[0]),
    "in a format": lambda: f"{X.mean():.2f}",
    "slice to a tensor": lambda: X[: N[1]],
    "tolist": X.tolist,
    "numpy": X.numpy,
    "as an array": lambda: np.asarray(X),
    "cpu": X.cpu,
    "to the cpu": lambda: X.to("cpu"),
    "copy into the host's": lambda: torch.empty(3, 4).copy_(X),
    "boolean index": lambda: X[X > 3],
    "boolean rows": lambda: X[N > 1],
    "writing by a boolean mask": lambda: X.clone().__setitem__(X > 100, torch.zeros(0, device=DEVICE)),
    "masked_select": lambda: torch.masked_select(X, X > 3),
    "nonzero": X.nonzero,
    "where with one argument": lambda: torch.where(X > 3),
    "unique": lambda: torch.unique(N),
    "unique_consecutive": lambda: torch.unique_consecutive(N),
    "bincount": lambda: torch.bincount(N),
    "equal": lambda: torch.equal(X, X + 0),
    "allclose": lambda: torch.allclose(X, X),
    "repeat_interleave": lambda: torch.repeat_interleave(X, N, 0),
    "numbers to the device": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "new_tensor": lambda: X.new_tensor([1.0]),
    "a list as an index": lambda: X[[0, 2]],
    "a host tensor to the device": lambda: torch.arange(3).to(DEVICE),
    "a host tensor to another's device": lambda: torch.arange(3).to(X),
    "a host tensor as an index": lambda: X[torch.arange(2)],
    "a host number copied": lambda: X.clone().copy_(torch.tensor(3.0)),
    "a host tensor added": lambda: X + torch.ones(4),
}
FREE = {
    "arithmetic": lambda: F.softmax(X @ X.t() + 1, -1).sum(),
    "filling by a mask": lambda: X.clone().masked_fill_(X > 3, 0.0),
    "one number by a mask": lambda: X.clone().__setitem__(X > 3, 0.0),
    "index": lambda: X[N],
    "slices": lambda: X[1:, :2].clone().__setitem__(slice(0, 1), 2.0),
    "where": lambda: torch.where(X > 3, X, 0.0),
    "shapes": lambda: (len(X), X.numel(), X.shape[0], torch.empty(len(X), device=DEVICE)),
    "repeat_interleave of a known size": lambda: torch.repeat_interleave(X, N, 0, output_size=3),
    "a number of the host as an operand": lambda: torch.eq(X, torch.tensor(3.0)),
    "a seed of the host": lambda: int(torch.randint(2**62, ())) + 1,
    "made on the device": lambda: X[torch.arange(2, device=DEVICE)] + torch.full((), 2.0, device=DEVICE),
    "a copy that nobody waits for": lambda: X[torch.arange(2).to(DEVICE, non_blocking=True)],
    "back to the host, later": lambda: torch.empty(3, 4).copy_(X, non_blocking=True),
    "another format": lambda: X.to(torch.bfloat16).to(X),
    "the host's own": lambda: torch.equal(torch.unique(torch.arange(3)), torch.arange(3, device="cpu")),
}


@pytest.mark.parametrize("name", WAITS)
def test_finds_a_wait(name):
    with pytest.raises(DeviceWait), no_device_wait():
        WAITS[name]()


@pytest.mark.parametrize("name", FREE)
def test_leaves_alone_what_does_not_wait(name):
    with no_device_wait():
        FREE[name]()


class _ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.sum().item()


def test_looks_into_backward():
    x = X.clone().requires_grad_()
    with no_device_wait():
        (x.square() * 2).sum().backward()
        given = _ReadsInBackward.apply(x)
    with pytest.raises(DeviceWait), no_device_wait():
        given.sum().backward()


def test_outside_all_is_allowed():
    with no_device_wait():
        total = X.sum()
    assert total.item() == 66
