"""One layout's memory, traffic and time, and the search through all layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from peer_scale.errors import UserError
from peer_scale.flops import actual_train_flops
from peer_scale.pipeline.costs import Costs, WorkCosts
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.schedule import build_schedule
from peer_scale.pipeline.search import choose_placement
from peer_scale.pipeline.simulator import simulate
from peer_scale.planning import memory, traffic
from peer_scale.planning.balance import equal_shares, in_turns, waiting_share, within_budget
from peer_scale.planning.inventory import Inventory, take_inventory
from peer_scale.planning.layout import Cluster, ParallelLayout, Workload, check_layout
from peer_scale.planning.roofline import Parts, forward_and_backward, update_parts
from peer_scale.planning.stage_works import stage_part

_NANOSECONDS = 1e9
_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
_MOST_STAGES = 16  # of the search
_MOST_TOKENS = 1 << 15  # of a micro-batch of the search


@dataclass(frozen=True)
class StageMemory:
    """Bytes per rank of one stage.

    Attributes:
        state: parameters, gradients, optimizer.
        activations: what the works along networks keep, of all micro-batches in flight.
        heads: what is beside the layers while it is run, see `heads_memory`.
        working: what ZeRO gathers and its buckets, and a layer that is run again.
    """

    state: memory.State
    activations: int
    heads: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.state.total + self.activations + self.heads + self.working


@dataclass(frozen=True)
class Plan:
    """What a layout takes. Times are seconds per step.

    `micro_batches` and `update` are those of the busiest stage on samples of mean length: all micro-batches, and what
    is done to its parameters. `zero_time` is what of ZeRO's traffic is not hidden, `bubble_time` what the busiest stage
    waits for others, `waiting_time` what ranks wait for the fullest of the data-parallel ones; `step_time` is all of
    it. `bubble` is the idle share of the busiest stage. `tokens_per_second` counts non-pad tokens; `fill` is their
    share of padded sequences. `waiting_share` is the waiting over the work, and `waiting_share_in_turns` what it would
    be without equal shares. `num_micro_batches` is a mean where a budget of tokens cuts them.
    """

    layout: ParallelLayout
    placement: Placement
    num_micro_batches: float
    stages: tuple[StageMemory, ...]
    traffic: traffic.Traffic
    micro_batches: Parts
    update: Parts
    zero_time: float
    bubble_time: float
    waiting_time: float
    step_time: float
    bubble: float
    mfu: float
    tokens_per_second: float
    fill: float
    waiting_share: float
    waiting_share_in_turns: float
    days: float
    fits: bool

    @property
    def peak_memory(self) -> int:
        """Bytes per rank of the fullest stage."""
        return max(stage.total for stage in self.stages)

    @property
    def fullest_stage(self) -> int:
        """The one that needs the most memory."""
        return max(range(len(self.stages)), key=lambda index: self.stages[index].total)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of the step by what they go to; they add up to it."""
        busy = self.micro_batches + self.update
        return {
            "products": busy.products,
            "attention": busy.attention,
            "element-wise": busy.element_wise,
            "messages": busy.messages + self.zero_time,
            "idle": busy.starved + self.bubble_time + self.waiting_time,
        }

    @property
    def host_time(self) -> float:
        """Seconds in which the host starts the step's kernels, beside all else."""
        return self.micro_batches.host + self.update.host

    @property
    def bound(self) -> str:
        """What the step goes by: the host's calls where they take longer than all kernels, else the largest part."""
        busy = self.micro_batches + self.update
        if self.host_time > busy.kernels:
            return "host calls"
        parts = self.parts
        largest = max(parts, key=lambda name: parts[name])
        return largest if largest != "idle" else "bubble" if self.bubble_time > self.waiting_time else "fullest rank"


def make_plan(workload: Workload, cluster: Cluster, layout: ParallelLayout) -> Plan:
    """Say everything about one layout.

    Raises:
        UserError: The model or the batch cannot be cut so.
    """
    check_layout(layout, workload)
    layout = within_budget(layout, workload)
    num_micro: float = workload.global_batch_size / (layout.data_parallel * layout.micro_batch_size)
    if layout.micro_batch_tokens is None:
        num_micro = layout.num_micro_batches(workload.global_batch_size)
    placement = _placement(workload, layout.pipeline_parallel, layout.activation_checkpointing)
    few = min(max(1, int(num_micro)), 4 * layout.pipeline_parallel)
    trial = _simulated(workload, cluster, replace(layout, zero_stage=1), few)
    # the middle of a long step repeats itself
    pipeline_time = trial.makespan + (num_micro - few) * trial.busiest.seconds
    inventories = _inventories(workload, placement, layout.tensor_parallel)
    stages = tuple(
        _stage_memory(workload, layout, placement, stage, inventory, held)
        for stage, (inventory, held) in enumerate(zip(inventories, trial.activations, strict=True))
    )
    sent = max(
        (_traffic(workload, layout, placement, stage, inventories[stage], num_micro) for stage in range(len(stages))),
        key=lambda one: one.total,
    )
    stride = layout.tensor_parallel
    exchanged = (sent.gradients + sent.parameters) / cluster.bandwidth(layout.data_parallel, stride)
    zero_time = exchanged * (1 - cluster.overlap)
    update = max(
        (
            update_parts(inventory, placement, stage, workload, cluster, layout, num_micro)
            for stage, inventory in enumerate(inventories)
        ),
        key=lambda parts: parts.seconds,
    )
    waiting = waiting_share(workload, layout, equal_shares)
    waiting_time = num_micro * max(0.0, (1 + waiting) * _unlaunched(workload, cluster, layout) - trial.busiest.seconds)
    step_time = pipeline_time + waiting_time + update.seconds + zero_time
    flops = actual_train_flops(workload.model, workload.objective, workload.size, samples=workload.global_batch_size)
    ranks = layout.data_parallel * layout.tensor_parallel * layout.pipeline_parallel
    tokens_per_second = workload.global_batch_size * workload.size.tokens / step_time
    return Plan(
        layout=layout,
        placement=placement,
        num_micro_batches=num_micro,
        stages=stages,
        traffic=sent,
        micro_batches=trial.busiest * num_micro,
        update=update,
        zero_time=zero_time,
        bubble_time=trial.bubble_time,
        waiting_time=waiting_time,
        step_time=step_time,
        bubble=trial.bubble_time / pipeline_time,
        mfu=flops / (step_time * ranks * cluster.peak_flops),
        tokens_per_second=tokens_per_second,
        fill=workload.fill,
        waiting_share=waiting,
        waiting_share_in_turns=waiting_share(workload, layout, in_turns),
        days=workload.tokens / tokens_per_second / 86400,
        fits=max(stage.total for stage in stages) + cluster.reserved <= cluster.memory,
    )


def search_plans(workload: Workload, cluster: Cluster) -> list[Plan]:
    """Plan all layouts that the model, the batch and the nodes allow: those that fit first, the fastest of them first.

    Tensor parallelism stays within a node. ZeRO stages that are as fast are ordered by memory.
    """
    plans = []
    for layout in _layouts(workload, cluster):
        try:
            plans.append(make_plan(workload, cluster, layout))
        except UserError:
            continue  # a cut that this model or batch does not allow
    if not plans:
        raise UserError(
            f"no layout of {cluster.num_ranks} ranks allows --global-batch-size {workload.global_batch_size}: give a "
            "multiple of the data-parallel size"
        )
    return sorted(plans, key=lambda plan: (not plan.fits, round(plan.step_time, 6), plan.peak_memory))


def _layouts(workload: Workload, cluster: Cluster) -> Iterator[ParallelLayout]:
    tensor_sizes = [size for size in _powers(cluster.gpus_per_node) if cluster.gpus_per_node % size == 0]
    for tensor, pipeline in itertools.product(tensor_sizes, _powers(_MOST_STAGES)):
        if cluster.num_ranks % (tensor * pipeline):
            continue
        data = cluster.num_ranks // (tensor * pipeline)
        if workload.global_batch_size % data:
            continue
        most = max(1, _MOST_TOKENS // workload.seq_length)
        sizes = [size for size in _powers(most) if workload.global_batch_size % (data * size) == 0]
        for micro, stage, again in itertools.product(sizes, (1, 2, 3), (False, True)):
            yield ParallelLayout(data, tensor, pipeline, stage, micro, tensor > 1, again)


def _powers(limit: int) -> list[int]:
    return [2**exponent for exponent in range(limit.bit_length()) if 2**exponent <= limit]


@lru_cache(maxsize=256)
def _placement(workload: Workload, num_stages: int, activation_checkpointing: bool) -> Placement:
    return choose_placement(
        workload.graph, num_stages, size=workload.full, activation_checkpointing=activation_checkpointing
    )


@lru_cache(maxsize=256)
def _inventories(workload: Workload, placement: Placement, tensor_parallel: int) -> tuple[Inventory, ...]:
    return take_inventory(workload.model, workload.objective, placement, tensor_parallel)


class _Trial(NamedTuple):
    """A simulated step: its seconds, those of one micro-batch on the busiest stage and of its bubble; bytes held."""

    makespan: float
    busiest: Parts
    bubble_time: float
    activations: tuple[int, ...]


@lru_cache(maxsize=4096)
def _simulated(workload: Workload, cluster: Cluster, layout: ParallelLayout, num_micro_batches: int) -> _Trial:
    """Run a step's schedule; the layout's ZeRO stage has no part in it."""
    placement = _placement(workload, layout.pipeline_parallel, layout.activation_checkpointing)
    times = _times(workload, cluster, layout, placement)
    costs = _costs_of(times, workload, cluster, layout, placement)
    result = simulate(build_schedule("two_pass", placement, num_micro_batches), costs)
    return _Trial(
        result.makespan / _NANOSECONDS,
        _busiest(times),
        (result.makespan - max(result.busy)) / _NANOSECONDS,
        result.peak_activations,
    )


def _unlaunched(workload: Workload, cluster: Cluster, layout: ParallelLayout) -> float:
    """Give the seconds of one micro-batch on the busiest stage if launches took no time: what grows with the tokens."""
    placement = _placement(workload, layout.pipeline_parallel, layout.activation_checkpointing)
    return _busiest(_times(workload, replace(cluster, launch=0.0), layout, placement)).seconds


_Times: TypeAlias = tuple[tuple[tuple[Parts, Parts], ...], ...]
"""Forward and backward of each work, in the graph's order, on each stage."""


def _times(workload: Workload, cluster: Cluster, layout: ParallelLayout, placement: Placement) -> _Times:
    return tuple(
        tuple(
            forward_and_backward(stage_part(placement, stage, work), workload, cluster, layout)
            for stage in range(placement.num_stages)
        )
        for work in placement.graph.works
    )


def _busiest(times: _Times) -> Parts:
    """Give the micro-batch's work of the stage that has the most of it."""
    stages = [sum((forward + backward for forward, backward in stage), Parts()) for stage in zip(*times, strict=True)]
    return max(stages, key=lambda parts: parts.seconds)


def _costs_of(
    times: _Times, workload: Workload, cluster: Cluster, layout: ParallelLayout, placement: Placement
) -> Costs:
    """Give the placement's costs in nanoseconds of a micro-batch on the cluster, and in bytes.

    Activations are those of works along networks; `heads_memory` has the others.
    """
    stride = layout.tensor_parallel * layout.data_parallel
    shapes = (shape for _, shape in placement.graph.networks)
    message = max(traffic.hidden_states_bytes(shape, workload, layout) for shape in shapes)
    costs = []
    for work, stages in zip(placement.graph.works, times, strict=True):
        parts = [stage_part(placement, stage, work) for stage in range(placement.num_stages)]
        held = [0 if work.network is None else memory.work_activations(part, workload, layout) for part in parts]
        forward, backward = (tuple(_nanoseconds(parts.seconds) for parts in each) for each in zip(*stages, strict=True))
        costs.append((work.name, WorkCosts(forward, backward, tuple(held))))
    return Costs(tuple(costs), latency=_nanoseconds(cluster.latency + message / cluster.bandwidth(2, stride)))


def _nanoseconds(seconds: float) -> int:
    return round(_NANOSECONDS * seconds)


def _stage_memory(
    workload: Workload,
    layout: ParallelLayout,
    placement: Placement,
    stage: int,
    inventory: Inventory,
    activations: int,
) -> StageMemory:
    working = memory.gathered_memory(inventory, layout, workload, _LIVE_PARAMETERS)
    working += memory.recomputed_layer(workload, layout) + memory.bucket_memory(inventory, layout)
    return StageMemory(
        memory.state_memory(inventory, layout, workload.precision),
        activations,
        memory.heads_memory(placement, stage, workload, layout),
        working,
    )


def _traffic(
    workload: Workload,
    layout: ParallelLayout,
    placement: Placement,
    stage: int,
    inventory: Inventory,
    num_micro: float,
) -> traffic.Traffic:
    gradients, parameters = traffic.zero_traffic(inventory, layout, workload, num_micro)
    return traffic.Traffic(
        tensor=num_micro * traffic.tensor_traffic(placement, stage, workload, layout),
        pipeline=num_micro * traffic.pipeline_traffic(placement, stage, workload, layout),
        gradients=gradients,
        parameters=parameters,
    )
