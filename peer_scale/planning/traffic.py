"""What a rank sends in one step, by kind; a ring of r ranks sends (r - 1) / r of a tensor, or twice that to reduce."""

from __future__ import annotations

from dataclasses import dataclass

from peer_scale.models.config import EncoderShape
from peer_scale.pipeline.instructions import Network
from peer_scale.pipeline.placement import Placement
from peer_scale.planning.inventory import Inventory
from peer_scale.planning.layout import Layout, Workload
from peer_scale.planning.memory import padded_groups

REUSE_DISTANCE = 10**9  # DeepSpeed's stage3_max_reuse_distance: what is used again sooner stays gathered
# of a position in `generator_head`: five fp32 numbers are reduced over tensor-parallel ranks, four gathered
_HEAD_REDUCED, _HEAD_GATHERED = 20, 16


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank of a stage sends in one optimizer step."""

    tensor: float
    pipeline: float
    gradients: float
    parameters: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.tensor + self.pipeline + self.gradients + self.parameters


def layer_traffic(shape: EncoderShape, workload: Workload, layout: Layout) -> float:
    """A layer's forward (and likewise its backward) of one micro-batch: two all-reduces of the hidden states.

    Under sequence parallelism each is a gather and a reduce-scatter of the same size together.
    """
    tokens = layout.micro_batch_size * workload.seq_length
    return 2 * all_reduce(tokens * shape.hidden_size * workload.number_bytes, layout.tensor_parallel)


def head_traffic(workload: Workload, layout: Layout) -> float:
    """The MLM head over vocabulary shards, forward and backward of one micro-batch."""
    positions, ranks = layout.micro_batch_size * workload.num_predictions, layout.tensor_parallel
    gradient = 4 * positions * workload.model.embedding_size
    return all_reduce(gradient + positions * _HEAD_REDUCED, ranks) + positions * _HEAD_GATHERED * (ranks - 1)


def tensor_traffic(placement: Placement, stage: int, workload: Workload, layout: Layout) -> float:
    """All tensor-parallel traffic of one micro-batch on a stage."""
    if layout.tensor_parallel == 1:
        return 0.0
    passes = 3 if layout.activation_checkpointing else 2
    tokens = layout.micro_batch_size * workload.seq_length
    total = 0.0
    for network in placement.networks:
        shape, num_layers = shape_of(workload, network), placement.stages[stage].num_layers(network)
        total += passes * num_layers * layer_traffic(shape, workload, layout)
        if layout.sequence_parallel:
            # gradients of biases and LayerNorms; the whole sequence at the top, its gradient at the bottom
            path, states = placement.path(network), shape.hidden_size * workload.number_bytes
            total += num_layers * 2 * all_reduce(3 * states, layout.tensor_parallel)
            total += ((stage == path[0]) + (stage == path[-1])) * scatter(tokens * states, layout.tensor_parallel)
    if placement.stages[stage].has_embeddings:
        embedded = tokens * workload.model.embedding_size * workload.number_bytes
        total += len(placement.networks) * all_reduce(embedded, layout.tensor_parallel)
    if stage == 0:
        total += head_traffic(workload, layout)
    return total


def pipeline_traffic(placement: Placement, stage: int, workload: Workload, layout: Layout) -> float:
    """Hidden states, their gradients, selected states and labels that a stage sends for one micro-batch."""
    total = 0.0
    positions = layout.micro_batch_size * workload.num_predictions
    for network in placement.networks:
        path = placement.path(network)
        if stage not in path or len(path) == 1:
            continue
        states = hidden_states_bytes(workload, layout, network)
        total += states * ((stage != path[-1]) + (stage != path[0]))
        selected = positions * shape_of(workload, network).hidden_size * workload.number_bytes
        if network == "generator":
            total += selected * ((stage == path[-1]) + (stage == 0))
        elif stage == 0:
            total += positions * 2 * 8  # ids and labels travel as doubles
    return total


def hidden_states_bytes(workload: Workload, layout: Layout, network: Network) -> int:
    """One message between neighbouring stages; under sequence parallelism a rank sends its slice."""
    tokens = layout.micro_batch_size * workload.seq_length
    split = layout.tensor_parallel if layout.sequence_parallel else 1
    return tokens * shape_of(workload, network).hidden_size * workload.number_bytes // split


def zero_traffic(
    inventory: Inventory, layout: Layout, workload: Workload, num_micro_batches: int
) -> tuple[float, float]:
    """Gradients and parameters that the data-parallel ranks exchange in one step.

    Gradients: ZeRO-1 all-reduces them once a step; ZeRO-2 all-reduces what each backward call has reached, as
    DeepSpeed's buckets belong to several ranks at once; ZeRO-3 reduce-scatters it. Parameters: ZeRO-1 and 2 gather them
    once a step. ZeRO-3 gathers them for every micro-batch: once where they stay from forward to backward, as DeepSpeed
    has it where they are few and every call uses the same ones, else for each.
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


def shape_of(workload: Workload, network: Network) -> EncoderShape:
    """Sizes of that network."""
    shape = workload.model.generator if network == "generator" else workload.model.ranker
    assert shape is not None, "there is no such network"
    return shape


def scatter(size: float, ranks: int) -> float:
    """What a rank sends in a ring reduce-scatter or all-gather of `size` bytes in all."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """What a rank sends in a ring all-reduce of `size` bytes."""
    return 2 * scatter(size, ranks)
