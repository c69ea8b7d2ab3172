"""What ZeRO-3 takes for granted and pipeline stages do not give: put right here and nowhere else.

1. When ZeRO-3 has recorded in which order modules run, it compares that order over ALL ranks. Stages have different
   modules, so the comparison would wait for ever: it is narrowed to the ranks that share this stage's parameters.
2. ZeRO-3 overwrites its gradient partitions in the first backward call of a step and adds to them in later ones, and
   tells the first by whether a forward call came before. With several backward calls a step, of different parts of the
   model, sums would be lost and others would be left from the step before: the partitions are zeroed after each step,
   and every backward call adds.

`check_internals` names what a DeepSpeed version lacks; tests/test_pipeline.py fails where the numbers go wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

_ORDER_CHECK = "assert_ints_same_as_other_ranks"


class StageCoordinator(PartitionedParameterCoordinator):
    """A coordinator that compares its records with the ranks of its own stage."""

    stage_group: dist.ProcessGroup

    def reset_step(self) -> None:
        """As DeepSpeed does at the end of a forward and backward, but for who is asked."""
        with _order_check_within(self.stage_group):
            super().reset_step()


def adapt_to_stages(engine: Any, stage_group: dist.ProcessGroup) -> None:
    """Prepare a ZeRO-3 engine for running one pipeline stage; `stage_group` are its data-parallel ranks."""
    check_internals(engine)
    coordinator = engine.optimizer.parameter_offload.param_coordinator
    coordinator.__class__ = StageCoordinator
    coordinator.stage_group = stage_group
    start_step(engine)


def start_step(engine: Any) -> None:
    """Forget the last step's gradients."""
    engine.optimizer.grad_partitions_flat_buffer.zero_()


def before_backward(engine: Any) -> None:
    """Make the coming backward call add to the gradient partitions."""
    engine.optimizer.micro_step_id = 1


def check_internals(engine: Any) -> None:
    """Raise RuntimeError naming what this DeepSpeed version does not have where it is expected."""
    optimizer = engine.optimizer
    wanted = {
        f"partitioned_param_coordinator.{_ORDER_CHECK}": hasattr(partitioned_param_coordinator, _ORDER_CHECK),
        "optimizer.grad_partitions_flat_buffer": hasattr(optimizer, "grad_partitions_flat_buffer"),
        "optimizer.micro_step_id": hasattr(optimizer, "micro_step_id"),
        "optimizer.parameter_offload.param_coordinator": isinstance(
            getattr(getattr(optimizer, "parameter_offload", None), "param_coordinator", None),
            PartitionedParameterCoordinator,
        ),
    }
    missing = [name for name, is_there in wanted.items() if not is_there]
    if missing:
        raise RuntimeError(f"ZeRO-3 under pipeline parallelism: this DeepSpeed version lacks {', '.join(missing)}")


@contextlib.contextmanager
def _order_check_within(group: dist.ProcessGroup) -> Iterator[None]:
    original = getattr(partitioned_param_coordinator, _ORDER_CHECK)
    setattr(partitioned_param_coordinator, _ORDER_CHECK, lambda ints: _require_same(ints, group))
    try:
        yield
    finally:
        setattr(partitioned_param_coordinator, _ORDER_CHECK, original)


def _require_same(ints: list[int], group: dist.ProcessGroup) -> None:
    # numbers go on counting from one engine of a process to the next: only their differences mean something
    order = [number - min(ints) for number in ints]
    everyone: list = [None] * group.size()
    dist.all_gather_object(everyone, order, group=group)
    if any(others != order for others in everyone):
        raise RuntimeError("ranks of one pipeline stage ran its modules in different orders")
