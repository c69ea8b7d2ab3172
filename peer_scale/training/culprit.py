"""Where in a step the first number came up that is not finite: found by doing the step again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.samples.examples import Batch
from peer_scale.training.trainer import Trainer


def find_culprits(
    trainer: Trainer, coordinator: RankCoordinator, step: int, micro_batches: Sequence[Batch]
) -> list[dict[str, Any]]:
    """Repeat a step without its update; give, rank by rank, what was not finite first.

    Each is `{"rank", "forward", "module"}` for a module's output, in the `forward`-th of its calls, or `{"rank",
    "parameter"}` for the gradient of a parameter. Ranks on which all is finite this time are left out. The caller has
    seen to it that the update does not happen. All ranks call it.
    """
    module = trainer.engine.module
    found: dict[str, Any] = {}
    calls: dict[str, int] = {}
    hooks = []
    for name, part in module.named_modules():

        def see_output(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1
            if not found and not all(torch.isfinite(tensor).all() for tensor in _floats(output)):
                found.update(module=name, forward=calls[name])

        hooks.append(part.register_forward_hook(see_output))
    for name, parameter in module.named_parameters():

        def see_gradient(gradient: Tensor, name: str = name) -> None:
            if not found and not torch.isfinite(gradient).all():
                found["parameter"] = name

        hooks.append(parameter.register_hook(see_gradient))
    try:
        trainer.run_step(step, micro_batches)
    finally:
        for hook in hooks:
            hook.remove()
    return [{"rank": rank, **one} for rank, one in enumerate(coordinator.exchange(found)) if one]


def _floats(output: Any) -> Iterator[Tensor]:
    """List the floating-point tensors in a module's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _floats(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _floats(part)
