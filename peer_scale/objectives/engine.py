"""What is used of DeepSpeed's engine around a PretrainingTask."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from peer_scale.objectives.task import PretrainingTask, TaskOutput


class Engine(Protocol):
    """Runs the task's forward and backward, and updates its parameters at the last backward call of a step."""

    module: PretrainingTask
    optimizer: Any
    skipped_steps: int
    global_steps: int
    global_samples: int

    def __call__(self, *inputs: Any) -> TaskOutput:
        """Run the task forward."""

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say, before a backward call, whether it is the last one of its step."""

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool = True) -> Any:
        """Add the gradients of `loss` to those of the step; with `scale_wrt_gas`, divided by the ds_config's number."""

    def step(self) -> Any:
        """End a backward call; after the last one of a step, clip and update."""

    def train(self) -> Any:
        """Switch dropout on."""

    def eval(self) -> Any:
        """Switch dropout off."""

    def get_global_grad_norm(self) -> Any:
        """Give the norm of the last step's gradients before clipping; None before the first step."""

    def fp16_enabled(self) -> bool:
        """Say whether losses are scaled."""

    def zero_optimization_stage(self) -> int:
        """Give ZeRO's stage."""

    def zero_cpu_offload(self) -> bool:
        """Say whether the optimizer is on the host."""
