"""What ZeRO takes for granted and pipeline stages do not give: put right here and nowhere else.

1. When ZeRO-3 has recorded in which order modules run, it compares that order over ALL ranks. Stages have different
   modules, so the comparison would wait for ever: it is narrowed to the ranks that share this stage's parameters.
2. ZeRO-3 overwrites its gradient partitions in the first backward call of a step and adds to them in later ones, and
   tells the first by whether a forward call came before. With several backward calls a step, of different parts of the
   model, sums would be lost and others would be left from the step before: the partitions are zeroed after each step,
   and every backward call adds. With the optimizer on the host ZeRO-2 leaves sums there too: they are zeroed as well.
3. With the optimizer on the host, ZeRO-2 and ZeRO-3 hand over to it what the last backward call of a step reaches. Here
   earlier calls reach other parameters: all are handed over before the update, by the function that DeepSpeed has for
   users who say themselves where a step ends.

`Adaptation` names what a DeepSpeed version lacks; tests/parity/test_parity.py and tests/unit/pipeline/ fail where the
numbers go wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from peer_scale.objectives.engine import Engine

_ORDER_CHECK = "assert_ints_same_as_other_ranks"


class StageCoordinator(PartitionedParameterCoordinator):
    """A coordinator that compares its records with the ranks of its own stage."""

    stage_group: dist.ProcessGroup

    def reset_step(self) -> None:
        """As DeepSpeed does at the end of a forward and backward, but for who is asked."""
        with _order_check_within(self.stage_group):
            super().reset_step()


class Adaptation:
    """Of one stage's engine; does nothing where its ZeRO stage needs nothing.

    Raises RuntimeError naming what this DeepSpeed version does not have where it is expected.
    """

    def __init__(self, engine: Engine, stage_group: dist.ProcessGroup) -> None:
        """`stage_group` are the stage's data-parallel ranks."""
        self._optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
        self._is_zero3 = stage == 3
        self._offloads = stage >= 2 and engine.zero_cpu_offload()
        self._check_internals()
        if self._is_zero3:
            coordinator = self._optimizer.parameter_offload.param_coordinator
            coordinator.__class__ = StageCoordinator
            coordinator.stage_group = stage_group
        self.after_update()

    def before_backward(self) -> None:
        """Make the coming backward call add to the sums of earlier ones."""
        if self._is_zero3:
            self._optimizer.micro_step_id = 1

    def before_update(self) -> None:
        """Hand the sums of all backward calls of the step over to an optimizer on the host."""
        if self._offloads:
            self._optimizer.finalize_gradient_accumulation_boundary()

    def after_update(self) -> None:
        """Forget the step's gradients."""
        if self._is_zero3:
            self._optimizer.grad_partitions_flat_buffer.zero_()
        elif self._offloads:
            for sums in self._optimizer.accumulated_grads_in_cpu.values():
                sums.zero_()

    def _check_internals(self) -> None:
        optimizer = self._optimizer
        wanted: dict[str, bool] = {}
        if self._is_zero3:
            offload = getattr(optimizer, "parameter_offload", None)
            coordinator = getattr(offload, "param_coordinator", None)
            wanted |= {
                "optimizer.micro_step_id": hasattr(optimizer, "micro_step_id"),
                f"partitioned_param_coordinator.{_ORDER_CHECK}": hasattr(partitioned_param_coordinator, _ORDER_CHECK),
                "optimizer.grad_partitions_flat_buffer": hasattr(optimizer, "grad_partitions_flat_buffer"),
                "optimizer.parameter_offload.param_coordinator": isinstance(
                    coordinator, PartitionedParameterCoordinator
                ),
            }
        if self._offloads:
            names = ["finalize_gradient_accumulation_boundary"]
            names += [] if self._is_zero3 else ["accumulated_grads_in_cpu"]
            wanted |= {f"optimizer.{name}": hasattr(optimizer, name) for name in names}
        missing = [name for name, is_there in wanted.items() if not is_there]
        if missing:
            raise RuntimeError(f"ZeRO under pipeline parallelism: this DeepSpeed version lacks {', '.join(missing)}")


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
