"""Finds, on CPU tensors, what would make the host wait for a GPU if the tensors were there.

Inside `no_device_wait()` every tensor stands for one on the device, but for those that a program makes on the host by
itself: `torch.arange(3)` or `torch.tensor(2.0)` without a device, and what is computed of such alone. To read these is
free. To read one of the device is a `DeviceWait`, and so is what torch does by reading one (boolean indexing, `unique`,
`nonzero`), and a copy between host and device that is not asked to be `non_blocking`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {
    *("_local_scalar_dense", "allclose", "equal", "is_nonzero"),
    *("bincount", "masked_select", "nonzero", "nonzero_numpy"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
}
"""Operators whose result, or its size, the host has to read."""
_FROM_PYTHON = {"tensor", "as_tensor", "asarray", "new_tensor", "from_numpy"}
_TO_HOST = {"cpu", "numpy", "tolist", "__array__"}
_COPIES = {"_to_copy", "copy", "copy_"}
_MARK = "_is_of_the_host"


class DeviceWait(AssertionError):
    """The host would wait for the device here."""


@contextlib.contextmanager
def no_device_wait() -> Iterator[None]:
    """Raise DeviceWait at the first operation inside that would wait for the device, naming it."""
    with _Calls(), _Operators():
        yield


class _Calls(TorchFunctionMode):
    """Sees what is called from Python: what makes tensors, and what reads them without an operator."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = _tensors((args, kwargs))
        device = _device_named(args, kwargs)
        if not _are_of_host(inputs):
            if name in _TO_HOST or (name == "to" and device == "cpu"):
                raise DeviceWait(f"{name}() of a tensor of the device")
            if name in ("__getitem__", "__setitem__") and not _is_of_host(args[0]) and _has_list(args[1]):
                raise DeviceWait("a list as an index is copied to the device")
        is_to_device = device not in (None, "cpu") or not _are_of_host(inputs)
        if name in _FROM_PYTHON and is_to_device:
            raise DeviceWait(f"{name}() copies Python's numbers to the device")
        moves = name == "to" and is_to_device and _is_of_host(args[0])
        if moves and not kwargs.get("non_blocking"):
            raise DeviceWait("to() copies from the host, and is not non_blocking")
        result = func(*args, **kwargs)
        if moves:  # by a copy: on the CPU `to` may have given the tensor itself
            result = result.clone()
            setattr(result, _MARK, False)
        elif not is_to_device:
            for made in _tensors(result):
                setattr(made, _MARK, True)
        return result


class _Operators(TorchDispatchMode):
    """Sees what is computed, also within torch and in backward."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        inputs = _tensors((args, kwargs))
        if not _are_of_host(inputs):
            self._check(name, func, args, kwargs)
            on_host = [tensor for tensor in inputs if _is_of_host(tensor)]
            if name in _COPIES:
                if on_host and not _non_blocking(func, args, kwargs):
                    raise DeviceWait(f"{name} between host and device that is not non_blocking")
            elif any(tensor.dim() for tensor in on_host):  # single numbers may be operands
                raise DeviceWait(f"{name} of tensors on the host and on the device")
        return func(*args, **kwargs)

    def _check(self, name: str, func: Any, args: Any, kwargs: Any) -> None:
        if name in _READS:
            raise DeviceWait(f"{name} of a tensor of the device")
        if name == "repeat_interleave" and kwargs.get("output_size") is None and "Tensor" in func._overloadname:
            raise DeviceWait("repeat_interleave without output_size")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            # one number for all that a mask says is filled in without asking how many they are
            fills = name != "index" and args[2].numel() == 1 and not (args[3:4] or [False])[0]
            if masks and not fills:
                raise DeviceWait(f"{name} by a boolean mask")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_of_host(tensor: Tensor) -> bool:
    return getattr(tensor, _MARK, False)


def _are_of_host(tensors: Any) -> bool:
    return all(_is_of_host(tensor) for tensor in tensors)


def _device_named(args: Any, kwargs: Any) -> Any:
    """Give the device that a call names, or None. One that the program says in so many words is "cpu", the host."""
    named = kwargs.get("device")
    if named is None:
        named = next(
            (
                arg
                for arg in args[1:]
                if isinstance(arg, torch.device) or (isinstance(arg, str) and arg in ("cpu", "cuda"))
            ),
            None,
        )
    return named


def _has_list(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list) for part in parts)


def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("non_blocking") if "non_blocking" in names else len(args)
    return bool(args[place] if place < len(args) else kwargs.get("non_blocking"))
