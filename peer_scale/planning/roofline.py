"""Seconds of a rank's work, apart by what bounds them: products, attention, element-wise work, messages, host calls.

A GPU runs a work's kernels one after the other while the host starts the next ones; what takes longer counts.
Tensor-parallel messages wait for kernels and kernels for them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

from peer_scale.models.config import EncoderShape, padded_vocab_size
from peer_scale.models.costs import Product, attention_matmul_flops, layer_products
from peer_scale.objectives.graph import Cost
from peer_scale.pipeline.placement import Placement
from peer_scale.planning import traffic
from peer_scale.planning.element_wise import layer_moved
from peer_scale.planning.inventory import Inventory
from peer_scale.planning.layout import Cluster, ParallelLayout, Workload
from peer_scale.planning.stage_works import StageWork, stage_works

HALF_SPEED_LENGTH: Final = 180
"""Tokens of a sequence at which attention gets half of the share that it gets on long ones: FlashAttention-2's figures
for 512 to 16,384 tokens, heads of 64, are within 2 % of length / (length + 180) on A100 and H100."""

_ATTENTION_BACKWARD: Final = 2.5  # products over those of the forward pass: the scores are computed again


@dataclass(frozen=True)
class Launches:
    """Kernels that the host starts: per layer, per work of the objective's graph beside its layers, and per step."""

    layer_forward: int
    layer_backward: int
    work_forward: int
    work_backward: int
    step: int


LAUNCHES: Final = {
    # whether torch.compile is used: by tools/count_launches.py for peer-small. A layer's backward includes DeepSpeed's
    # copies of its 11 gradients under ZeRO-1 and ZeRO-2.
    False: Launches(layer_forward=9, layer_backward=35, work_forward=146, work_backward=65, step=68),
    True: Launches(layer_forward=9, layer_backward=32, work_forward=96, work_backward=65, step=68),
}


@dataclass(frozen=True)
class Parts:
    """Seconds.

    Attributes:
        products: matrix products of layers and heads.
        attention: the attention kernels.
        element_wise: all else that moves tensors through the GPU's memory.
        messages: tensor-parallel traffic, which nothing hides.
        host: what the host takes to start all kernels, beside the GPU's work.
        starved: what of that the GPU waits for.
    """

    products: float = 0.0
    attention: float = 0.0
    element_wise: float = 0.0
    messages: float = 0.0
    host: float = 0.0
    starved: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> Parts:
        return Parts(*(times * getattr(self, field.name) for field in fields(self)))

    @property
    def kernels(self) -> float:
        """What the GPU computes."""
        return self.products + self.attention + self.element_wise

    @property
    def seconds(self) -> float:
        """All of it, end to end."""
        return self.kernels + self.messages + self.starved

    def started_by(self, launches: float, cluster: Cluster) -> Parts:
        """Let the host start it with so many launches."""
        host = launches * cluster.launch
        return replace(self, host=host, starved=max(0.0, host - self.kernels))


def product_seconds(cluster: Cluster, rows: float, inputs: float, outputs: float, number_bytes: int) -> float:
    """Give the time of [rows, inputs] x [inputs, outputs]; each of the two products of its backward takes as long.

    It is the FLOPs at the share of the peak that large products get, and then all three matrices once through memory:
    loads before the first FLOP of a tile and stores after its last are hidden less the shorter the inner dimension. So
    a product of a million rows and 768 x 768 gets 71 % of what a large one gets on an A100, 58 % on an H100. Tiles that
    do not come out even are not counted.
    """
    computing = 2 * rows * inputs * outputs / (cluster.peak_flops * cluster.efficiency)
    moving = number_bytes * (rows * inputs + inputs * outputs + rows * outputs) / cluster.memory_bandwidth
    return computing + moving


def attention_seconds(cluster: Cluster, flops: float, length: float) -> float:
    """Give the time of attention's FLOPs on sequences of that length."""
    share = cluster.attention * length / (length + HALF_SPEED_LENGTH)
    return flops / (cluster.peak_flops * share)


def forward_and_backward(
    part: StageWork, workload: Workload, cluster: Cluster, layout: ParallelLayout
) -> tuple[Parts, Parts]:
    """Give a stage's part in a work, of one micro-batch; no backward where the work has none."""
    launches = LAUNCHES[workload.compiled]
    forward, backward = _beside_layers(part, workload, cluster, layout)
    started = [launches.work_forward * part.ends, launches.work_backward * part.ends]
    if part.shape is not None:
        there, back = _layer(part.shape, workload, cluster, layout)
        times, again = part.num_layers, layout.activation_checkpointing
        forward += there * times
        backward += (back + there * again) * times
        started[0] += times * launches.layer_forward
        started[1] += times * (launches.layer_backward + again * launches.layer_forward)
    if not part.work.has_backward:
        return forward.started_by(started[0], cluster), Parts()
    return forward.started_by(started[0], cluster), backward.started_by(started[1], cluster)


def _layer(shape: EncoderShape, workload: Workload, cluster: Cluster, layout: ParallelLayout) -> tuple[Parts, Parts]:
    """Give one layer's forward and backward, without the launches."""
    ranks, number = layout.tensor_parallel, workload.number_bytes
    blocks = workload.graph.blocks
    tokens, pairs = (
        layout.micro_batch_size * workload.size.tokens,
        layout.micro_batch_size * workload.size.token_pairs,
    )
    products = sum(_split_product(cluster, tokens, matrix, ranks, number) for matrix in layer_products(shape, blocks))
    flops = attention_matmul_flops(shape, tokens, pairs, blocks) / ranks
    attention = attention_seconds(cluster, flops, pairs / tokens)
    moved = layer_moved(workload.model, shape, layout)
    moving = tokens * number / cluster.memory_bandwidth
    messages = traffic.layer_traffic(shape, workload, layout) / cluster.bandwidth(ranks, 1)
    messages += 2 * cluster.latency * (ranks > 1)
    return (
        Parts(products, attention, moved.forward * moving, messages),
        Parts(2 * products, _ATTENTION_BACKWARD * attention, moved.backward * moving, messages),
    )


def _split_product(cluster: Cluster, rows: float, matrix: Product, ranks: int, number_bytes: int) -> float:
    inputs, outputs, splits = matrix
    if splits == "outputs":
        return product_seconds(cluster, rows, inputs, outputs / ranks, number_bytes)
    return product_seconds(cluster, rows, inputs / ranks, outputs, number_bytes)


def _beside_layers(
    part: StageWork, workload: Workload, cluster: Cluster, layout: ParallelLayout
) -> tuple[Parts, Parts]:
    """Give embeddings and heads, without the launches; works beside the word table are divided as its rows are."""
    share = layout.micro_batch_size / (layout.tensor_parallel if part.work.network is None else 1)
    computing = share / (cluster.peak_flops * cluster.efficiency)
    moving = share * workload.number_bytes / cluster.memory_bandwidth
    made_again = tuple(cost for cost in part.costs if cost.workspace)

    def parts(costs: tuple[Cost, ...], times: int) -> Parts:
        flops, moved = (workload.size.count(costs, what) for what in ("flops", "moved"))
        return Parts(products=flops * computing, element_wise=moved * moving) * times

    return parts(part.costs, 1), parts(part.costs, 2) + parts(made_again, 1)


def update_parts(
    inventory: Inventory,
    placement: Placement,
    stage: int,
    workload: Workload,
    cluster: Cluster,
    layout: ParallelLayout,
    num_micro_batches: float,
) -> Parts:
    """Give what a stage does to parameters in a step: it adds up gradients at each micro-batch, and runs the optimizer.

    A gradient is read and added to its fp32 sum. Each work that reads the word table gives a gradient of all of it,
    which is filled and added. The optimizer works on the rank's share: the norm reads the gradient, clipping reads and
    writes it, AdamW reads it, the master and both moments and writes these three, the new weight is written in the
    compute format, and the sum is filled with zeros.
    """
    number = workload.number_bytes
    at_each = (number + 4 + 4) * inventory.count
    if placement.stages[stage].has_embeddings:
        rows = padded_vocab_size(workload.model.vocab_size, layout.tensor_parallel) // layout.tensor_parallel
        users = sum(part.begins and part.work.has_backward for part in stage_works(placement, stage))
        at_each += 4 * number * rows * workload.model.embedding_size * users
    per_share = 4 + (4 + 4) + (16 + 12) + (4 + number) + 4
    at_end = per_share * inventory.count / layout.data_parallel
    moved = num_micro_batches * at_each + at_end
    parts = Parts(element_wise=moved / cluster.memory_bandwidth)
    return parts.started_by(LAUNCHES[workload.compiled].step, cluster)
