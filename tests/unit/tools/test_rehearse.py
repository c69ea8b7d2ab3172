"""The rehearsal on fake CUDA tensors: what of it a build of torch for the CPU can run, and that it finds faults."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import Function

import rehearse
from peer_scale.kernels.gated import gated_activation
from peer_scale.kernels.norm import _CpuNorm
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve


def run_of(*flags):
    return resolve(build_parser().parse_args(["--model", *flags]), 1)


def test_the_command(capsys):
    with pytest.raises(SystemExit) as refused:
        rehearse.main(["--model", "peer-huge"])
    assert refused.value.code == 2
    capsys.readouterr()
    if torch.version.cuda is not None and dist.is_initialized():
        dist.destroy_process_group()  # of an earlier test: a rehearsal makes its own
    sizes = ["--seq-length", "32", "--micro-batch-size", "3", "--global-batch-size", "3"]
    code = rehearse.main(["--model", "bert-tiny", *sizes])
    captured = capsys.readouterr()
    if torch.version.cuda is None:
        assert code == 2
        assert captured.err.startswith("error: this torch is built for the CPU alone")
        assert captured.err.count("\n") == 1 and captured.out == ""
    else:
        assert code == 0
        assert "| `bert-tiny` |" + 3 * " full ok, ragged ok |" in captured.out


def test_micro_batches():
    run = run_of("teams-tiny", "--seq-length", "64", "--micro-batch-size", "5", "--global-batch-size", "5")
    full, ragged = (rehearse.batch_of(run, ragged=ragged) for ragged in (False, True))
    assert full.sequences.lengths == (64,) * 5
    assert ragged.sequences.lengths == (64, 50, 36, 22, 8)
    assert ragged.extra_uniforms.shape == (ragged.selected.num_tokens, 4)
    assert full.selected.lengths == (10,) * 5, "15 % of 64 tokens"


class _NotTransposed(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    def backward(ctx, grad):
        _, y = ctx.saved_tensors
        return grad @ y.new_ones(4, 4), None


class _TooFew(_NotTransposed):
    @staticmethod
    def backward(ctx, grad):
        return grad


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_NotTransposed, "gives a gradient (2, 4) on cpu for an input (2, 3) on cpu"),
        (_TooFew, "gives 1 gradients for 2 inputs"),
    ],
)
def test_a_wrong_backward_is_found(function, said):
    apply = rehearse.forth_and_back(function).__func__
    with pytest.raises(rehearse.LeftBehind) as found:
        apply(torch.ones(2, 3), torch.ones(3, 4))
    assert str(found.value) == f"{function.__name__}.backward {said}"


def test_our_functions_go_forth_and_back_and_are_left_as_they_were():
    assert _CpuNorm in set(rehearse.own_functions())
    x = torch.ones(3, 8)
    plain = gated_activation(x, None, "swiglu")
    with rehearse.stand_ins(), torch.no_grad():
        assert all("apply" in vars(function) for function in rehearse.own_functions())
        assert torch.equal(gated_activation(x, None, "swiglu"), plain)
    assert not any("apply" in vars(function) for function in rehearse.own_functions())


FAULTS = {
    "a copy to the device": lambda there: torch.zeros(3).to(there.device),
    "a copy to the host": lambda there: there.cpu(),
    "an index on the host": lambda there: torch.ops.aten.index.Tensor(there, [torch.zeros(2, dtype=torch.int64)]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_the_host_would_wait_for(fault):
    with FakeTensorMode(), torch.no_grad(), rehearse.HostWaits():
        there = torch.empty(3, device="cuda")
        with pytest.raises(rehearse.LeftBehind):
            FAULTS[fault](there)
        with pytest.raises(DataDependentOutputException):
            there.sum().item()
        assert torch.zeros(3).to(there.device, non_blocking=True).is_cuda
        assert int(torch.randint(2**62, ())) == 1, "a seed of the host has some number"


def test_a_failure_is_told_in_a_line_with_its_place():
    with pytest.raises(RuntimeError) as raised:
        gated_activation(torch.ones(3, 4), torch.ones(5), "geglu")
    line = rehearse.describe(raised.value)
    assert line.startswith("gated.py:")
    assert "RuntimeError: The size of tensor a (4) must match" in line
