"""Models larger than memory: on the meta device, with weights only while a block of them computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

Read = Callable[[str], Tensor]


@contextlib.contextmanager
def lend(block: nn.Module, name: str, read: Read) -> Iterator[None]:
    """Give `block`, which the model calls `name`, its weights; afterwards it has what it had."""
    own = _parameters(block)
    try:
        for module, key, path in own:
            module._parameters[key] = nn.Parameter(read(f"{name}.{path}"), requires_grad=False)
        yield
    finally:
        for (module, key, _), before in zip(own, own.values(), strict=True):
            module._parameters[key] = before


@contextlib.contextmanager
def lend_each_block(model: nn.Module, read: Read) -> Iterator[None]:
    """Lend each block of `model` its weights while its `forward` runs. `read` takes a parameter's full name.

    A block is a module with all that is in it; those that hold a list of layers are gone into.
    """
    handles = []
    for name, block in _blocks(model, ""):
        loan = contextlib.ExitStack()

        def before(*_: Any, block: nn.Module = block, name: str = name, loan: contextlib.ExitStack = loan) -> None:
            loan.enter_context(lend(block, name, read))

        def after(*_: Any, loan: contextlib.ExitStack = loan) -> None:
            loan.close()

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parameters(block: nn.Module) -> dict[tuple[nn.Module, str, str], nn.Parameter]:
    """List parameters by the module that has them, their name there, and their name in the block."""
    return {
        (module, key, f"{path}.{key}".lstrip(".")): parameter
        for path, module in block.named_modules()
        for key, parameter in module.named_parameters(recurse=False)
    }


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if not any(isinstance(inner, (nn.ModuleList, nn.ModuleDict)) for inner in module.modules()):
        yield name, module
        return
    assert not list(module.parameters(recurse=False)), f"{name} has parameters beside its layers"
    for key, child in module.named_children():
        yield from _blocks(child, f"{name}.{key}".lstrip("."))
