"""One layout's memory, traffic and time, and the search through all layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from peer_scale.errors import UserError
from peer_scale.flops import actual_train_flops
from peer_scale.objectives.graph import SampleSize, Work
from peer_scale.pipeline.costs import Costs, WorkCosts
from peer_scale.pipeline.placement import Placement
from peer_scale.pipeline.schedule import build_schedule
from peer_scale.pipeline.search import choose_placement
from peer_scale.pipeline.simulator import simulate
from peer_scale.planning import memory, traffic
from peer_scale.planning.balance import equal_shares, in_turns, waiting_share
from peer_scale.planning.inventory import Inventory, take_inventory
from peer_scale.planning.layout import Cluster, ParallelLayout, Workload, check_layout
from peer_scale.planning.stage_works import StageWork, stage_part

_NANOSECONDS = 1e9
_LAYER_KERNELS = 15  # started for a layer's forward; backward takes about twice as many
_LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
_MOST_STAGES = 16  # of the search


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
    """What a layout takes. Times are seconds per step; `bubble` is the idle share of the busiest stage.

    `compute_time` and `tensor_time` are of samples of mean length; `waiting_time` is what ranks wait for the fullest of
    the data-parallel ones. `tokens_per_second` counts non-pad tokens; `fill` is their share of padded sequences.
    `waiting_share` is the waiting over the work, and `waiting_share_in_turns` what it would be without equal shares.
    """

    layout: ParallelLayout
    placement: Placement
    num_micro_batches: int
    stages: tuple[StageMemory, ...]
    traffic: traffic.Traffic
    compute_time: float
    tensor_time: float
    zero_time: float
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


def make_plan(workload: Workload, cluster: Cluster, layout: ParallelLayout) -> Plan:
    """Say everything about one layout.

    Raises:
        UserError: The model or the batch cannot be cut so.
    """
    check_layout(layout, workload)
    num_micro = layout.num_micro_batches(workload.global_batch_size)
    placement = _placement(workload, layout.pipeline_parallel, layout.activation_checkpointing)
    few = min(num_micro, 4 * layout.pipeline_parallel)
    makespan, busiest, bubble_time, activations = _simulated(workload, cluster, replace(layout, zero_stage=1), few)
    # the middle of a long step repeats itself
    pipeline_time = makespan + (num_micro - few) * busiest
    inventories = _inventories(workload, placement, layout.tensor_parallel)
    stages = tuple(
        _stage_memory(workload, layout, placement, stage, inventory, held)
        for stage, (inventory, held) in enumerate(zip(inventories, activations, strict=True))
    )
    sent = max(
        (_traffic(workload, layout, placement, stage, inventories[stage], num_micro) for stage in range(len(stages))),
        key=lambda one: one.total,
    )
    stride = layout.tensor_parallel
    exchanged = (sent.gradients + sent.parameters) / cluster.bandwidth(layout.data_parallel, stride)
    zero_time = exchanged * (1 - cluster.overlap)
    waiting = waiting_share(workload, layout, equal_shares)
    waiting_time = num_micro * max(0.0, (1 + waiting) * _unlaunched(workload, cluster, layout, placement) - busiest)
    step_time = pipeline_time + waiting_time + zero_time
    flops = actual_train_flops(workload.model, workload.objective, workload.size, samples=workload.global_batch_size)
    ranks = layout.data_parallel * layout.tensor_parallel * layout.pipeline_parallel
    tokens_per_second = workload.global_batch_size * workload.size.tokens / step_time
    tensor_bandwidth = cluster.bandwidth(layout.tensor_parallel, 1)
    return Plan(
        layout=layout,
        placement=placement,
        num_micro_batches=num_micro,
        stages=stages,
        traffic=sent,
        compute_time=num_micro * busiest - sent.tensor / tensor_bandwidth,
        tensor_time=sent.tensor / tensor_bandwidth,
        zero_time=zero_time,
        waiting_time=waiting_time,
        step_time=step_time,
        bubble=bubble_time / pipeline_time,
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
        sizes = [size for size in _powers(64) if workload.global_batch_size % (data * size) == 0]
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


@lru_cache(maxsize=4096)
def _simulated(
    workload: Workload, cluster: Cluster, layout: ParallelLayout, num_micro_batches: int
) -> tuple[float, float, float, tuple[int, ...]]:
    """Give the seconds of the schedule, of one micro-batch on the busiest stage, idle on it; each stage's activations.

    The layout's ZeRO stage has no part in it.
    """
    placement = _placement(workload, layout.pipeline_parallel, layout.activation_checkpointing)
    schedule = build_schedule("two_pass", placement, num_micro_batches)
    costs = _costs_on(workload, cluster, layout, placement)
    result = simulate(schedule, costs)
    busiest = max(costs.stage_times()) / _NANOSECONDS
    makespan = result.makespan / _NANOSECONDS
    return makespan, busiest, makespan - max(result.busy) / _NANOSECONDS, result.peak_activations


def _unlaunched(workload: Workload, cluster: Cluster, layout: ParallelLayout, placement: Placement) -> float:
    """Give the seconds of one micro-batch on the busiest stage if launches took no time: what grows with the tokens."""
    costs = _costs_on(workload, replace(cluster, launch=0.0), layout, placement)
    return max(costs.stage_times()) / _NANOSECONDS


def _costs_on(workload: Workload, cluster: Cluster, layout: ParallelLayout, placement: Placement) -> Costs:
    """Give the placement's costs in nanoseconds of a micro-batch on the cluster, and in bytes."""
    works = placement.graph.works
    stride = layout.tensor_parallel * layout.data_parallel
    shapes = (shape for _, shape in placement.graph.networks)
    message = max(traffic.hidden_states_bytes(shape, workload, layout) for shape in shapes)
    return Costs(
        tuple((work.name, _work_costs(workload, cluster, layout, placement, work)) for work in works),
        latency=_nanoseconds(cluster.latency + message / cluster.bandwidth(2, stride)),
    )


def _work_costs(
    workload: Workload, cluster: Cluster, layout: ParallelLayout, placement: Placement, work: Work
) -> WorkCosts:
    """Give one work's times: its products, or the launches of its layers' kernels, and its layers' traffic.

    Activations are those of works along networks; `heads_memory` has the others.
    """
    rate = cluster.peak_flops * cluster.efficiency * layout.tensor_parallel / layout.micro_batch_size
    again = layout.activation_checkpointing  # backward runs the layers' forward once more
    launch = cluster.launch * _LAYER_KERNELS
    flops = placement.costs_of(workload.size, activation_checkpointing=again).of(work.name)
    parts = [stage_part(placement, stage, work) for stage in range(placement.num_stages)]
    per_layer = 0.0
    if work.network is not None:
        shape = placement.graph.shape(work.network)
        per_layer = traffic.layer_traffic(shape, workload, layout) / cluster.bandwidth(layout.tensor_parallel, 1)
        per_layer += 2 * cluster.latency * (layout.tensor_parallel > 1)
    forward, backward = [], []
    for part, there, back in zip(parts, flops.forward, flops.backward, strict=True):
        count = part.num_layers
        forward.append(max(there / rate, count * launch) + count * per_layer)
        products = (back + _made_again(part, workload.size)) / rate
        backward.append(max(products, (2 + again) * count * launch) + (1 + again) * count * per_layer)
    return WorkCosts(
        forward=tuple(map(_nanoseconds, forward)),
        backward=tuple(map(_nanoseconds, backward)) if work.has_backward else flops.backward,
        activations=tuple(
            0 if work.network is None else memory.work_activations(part, workload, layout) for part in parts
        ),
    )


def _made_again(part: StageWork, size: SampleSize) -> float:
    """Count the FLOPs of what backward makes once more, since a workspace (chunks of logits) is not kept."""
    return size.count(tuple(cost for cost in part.costs if cost.workspace), "flops")


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
    num_micro: int,
) -> traffic.Traffic:
    gradients, parameters = traffic.zero_traffic(inventory, layout, workload, num_micro)
    return traffic.Traffic(
        tensor=num_micro * traffic.tensor_traffic(placement, stage, workload, layout),
        pipeline=num_micro * traffic.pipeline_traffic(placement, stage, workload, layout),
        gradients=gradients,
        parameters=parameters,
    )
