"""What a rank sends per step, by kind; a ring of r ranks sends (r - 1) / r of a tensor, or twice that to reduce."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from peer_scale.models.config import EncoderShape
from peer_scale.objectives.graph import Graph, ValueFormat
from peer_scale.pipeline.dataflow import sends, stage_work
from peer_scale.pipeline.instructions import Message
from peer_scale.pipeline.placement import Placement
from peer_scale.planning.inventory import Inventory
from peer_scale.planning.layout import ParallelLayout, Workload
from peer_scale.planning.memory import padded_groups
from peer_scale.planning.stage_works import StageWork, stage_works

REUSE_DISTANCE = 10**9  # DeepSpeed's stage3_max_reuse_distance: what is used again sooner stays gathered


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank of a stage sends per optimizer step."""

    tensor: float
    pipeline: float
    gradients: float
    parameters: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.tensor + self.pipeline + self.gradients + self.parameters


def layer_traffic(shape: EncoderShape, workload: Workload, layout: ParallelLayout) -> float:
    """Count a layer's forward (and likewise its backward) of one micro-batch: two all-reduces of the hidden states.

    Under sequence parallelism each is a gather and a reduce-scatter of the same size together. What backward gathers
    besides, beside its products, is not in it.
    """
    tokens = _rows(workload, layout) * (layout.tensor_parallel if layout.sequence_parallel else 1)
    return 2 * all_reduce(tokens * shape.hidden_size * workload.number_bytes, layout.tensor_parallel)


def tensor_traffic(placement: Placement, stage: int, workload: Workload, layout: ParallelLayout) -> float:
    """Count all tensor-parallel traffic of one micro-batch on a stage."""
    if layout.tensor_parallel == 1:
        return 0.0
    return sum(_work_traffic(part, workload, layout) for part in stage_works(placement, stage))


def _work_traffic(part: StageWork, workload: Workload, layout: ParallelLayout) -> float:
    """Count the tensor-parallel traffic of one work: its layers, its embeddings, and what its costs say."""
    ranks, size = layout.tensor_parallel, layout.micro_batch_size
    total = all_reduce(size * workload.size.count(part.costs, "reduced_bytes"), ranks)
    total += size * workload.size.count(part.costs, "gathered_bytes") * (ranks - 1)
    if part.shape is None:
        return total
    tokens, has_backward = size * workload.size.tokens, part.work.has_backward
    times = 1 + (1 + layout.activation_checkpointing) * has_backward
    total += times * part.num_layers * layer_traffic(part.shape, workload, layout)
    if part.begins:
        total += all_reduce(tokens * workload.model.embedding_size * workload.number_bytes, ranks)
    if layout.sequence_parallel:
        # the whole sequence at the top, its gradient at the bottom; gradients of biases and LayerNorms
        states = part.shape.hidden_size * workload.number_bytes
        joined = _rows(workload, layout) * ranks * states
        total += (part.ends * part.work.end_joins + part.begins * has_backward) * scatter(joined, ranks)
        parameters = 2 * (workload.model.linear_bias + 1 + workload.model.has_norm_bias)
        total += has_backward * part.num_layers * all_reduce(parameters * states, ranks)
        # the rows that the two products with split inputs are made of are joined again for their weights' gradients
        total += has_backward * part.num_layers * 2 * scatter(joined, ranks)
    return total


def pipeline_traffic(placement: Placement, stage: int, workload: Workload, layout: ParallelLayout) -> float:
    """Count what a stage sends to other stages for one micro-batch: hidden states, values, and their gradients."""
    done = stage_work(placement, stage, micro=0)
    messages = (message for work in done for message in sends(placement, stage, work))
    return sum((message_bytes(placement.graph, message, workload, layout) for message in messages), 0.0)


def message_bytes(graph: Graph, message: Message, workload: Workload, layout: ParallelLayout) -> float:
    """Give the size of one message; a gradient is as large as what it belongs to."""
    networks = {work.name: work.network for work in graph.works}
    network = networks.get(message.value)
    if network is not None:
        return hidden_states_bytes(graph.shape(network), workload, layout)
    value = graph.value(message.value)
    positions = layout.micro_batch_size * workload.size.selected
    sizes: Final[dict[ValueFormat, int]] = {"compute": workload.number_bytes, "float32": 4, "int64": 8}
    return positions * (value.width or 1) * sizes[value.format]


def hidden_states_bytes(shape: EncoderShape, workload: Workload, layout: ParallelLayout) -> float:
    """Give the size of one message between neighbouring stages; under sequence parallelism a rank sends its slice."""
    return _rows(workload, layout) * shape.hidden_size * workload.number_bytes


def _rows(workload: Workload, layout: ParallelLayout) -> float:
    """Count the rows of hidden states that a rank has; under sequence parallelism slices are filled to one size."""
    tokens = layout.micro_batch_size * workload.size.tokens
    return math.ceil(tokens / layout.tensor_parallel) if layout.sequence_parallel else tokens


def zero_traffic(
    inventory: Inventory, layout: ParallelLayout, workload: Workload, num_micro_batches: float
) -> tuple[float, float]:
    """Count the gradients and parameters that the data-parallel ranks exchange per step.

    Gradients: ZeRO-1 all-reduces them once per step; ZeRO-2 all-reduces what each backward call has reached, as
    DeepSpeed's buckets belong to several ranks at once; ZeRO-3 reduce-scatters it. Parameters: ZeRO-1 and 2 gather them
    once per step. ZeRO-3 gathers them for every micro-batch: once where they stay from forward to backward, as
    DeepSpeed has it where they are few and every call uses the same ones, else for each.
    """
    ranks, number = layout.data_parallel, workload.number_bytes
    reached = num_micro_batches * number * sum(inventory.reached)
    if layout.zero_stage == 3:
        stay = len(inventory.reached) == 1 and 2 * inventory.count <= REUSE_DISTANCE
        return scatter(reached, ranks), scatter(reached, ranks) * (1 if stay else 2)
    groups = number * sum(padded_groups(inventory, ranks))
    if layout.zero_stage == 2:
        return all_reduce(reached, ranks), scatter(groups, ranks)
    # DeepSpeed's BF16_Optimizer, which ZeRO-1 gets with bf16, reduces the groups with their padding
    once = groups if workload.precision == "bf16" else number * inventory.count
    return all_reduce(once, ranks), scatter(groups, ranks)


def scatter(size: float, ranks: int) -> float:
    """Count what a rank sends in a ring reduce-scatter or all-gather of `size` bytes in all."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """Count what a rank sends in a ring all-reduce of `size` bytes."""
    return 2 * scatter(size, ranks)
