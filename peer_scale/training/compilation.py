"""torch.compile of a run's layers and statistics, where the run asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from peer_scale.errors import UserError
from peer_scale.models.layers import TransformerLayer
from peer_scale.objectives.task import PretrainingTask

Function = Callable[..., Any]

_RECOMPILE_LIMIT = 64
"""Versions of one function: widths of networks, kinds of layers, training or validation, few or many tokens."""


def check_compiler(device: torch.device) -> None:
    """Compile a function of one line, and raise UserError where that fails: no layer would fare better.

    torch writes C++ for CPUs and Triton for GPUs; both need a C++ compiler on the machine.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        cause = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
        raise UserError(f"--compile: torch's compiler does not work on this machine: {cause}") from error


def compile_task(task: PretrainingTask, *, backend: str = "inductor") -> None:
    """Compile what surrounds the attention in every layer of `task`, its statistics and the ranking loss.

    The attention itself stays as it is: it is a kernel of its own, and works by the sequences' lengths, of which every
    micro-batch has others. What is compiled sees tensors alone, with a number of tokens that may vary: layers of one
    width and kind share what is compiled, whatever the micro-batches are.
    """
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    torch._dynamo.config.specialize_float = True  # shares of dropout and the like never change

    # messages of tensor parallelism that overlap with products, or statistics of another's objective, may break a graph
    is_alone = task.model.tensor_parallel.size == 1

    def compiled(function: Function, fullgraph: bool = False) -> Function:
        return torch.compile(function, dynamic=True, fullgraph=fullgraph, backend=backend)

    for layer in task.modules():
        if isinstance(layer, TransformerLayer):
            layer.after_attention = compiled(layer.after_attention, is_alone)  # type: ignore[method-assign]
            if layer.is_pre_norm or layer.attention.rotary_base is not None:  # else there is one product
                layer.before_attention = compiled(layer.before_attention, is_alone)  # type: ignore[method-assign]
    task.call = _Compiled(compiled)


class _Compiled:
    """Calls functions, each compiled when it is first called."""

    def __init__(self, compiled: Callable[[Function], Function]) -> None:
        self._compiled = functools.cache(compiled)

    def __call__(self, function: Function, *arguments: Any) -> Any:
        return self._compiled(function)(*arguments)
