"""What a rank sends in one step, by kind; a ring of r ranks sends (r - 1) / r of a tensor, or twice that to reduce."""

from __future__ import annotations

from dataclasses import dataclass

from peer_scale.models.config import EncoderShape
from peer_scale.pipeline.instructions import Network
from peer_scale.pipeline.placement import Placement
from peer_scale.planning.inventory import Inventory
from peer_scale.planning.layout import Layout, Workload

_HEAD_BYTES = 36  # a position sends so much over tensor-parallel ranks in `generator_head`


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
    positions = layout.micro_batch_size * workload.num_predictions
    gradient = all_reduce(4 * positions * workload.model.embedding_size, layout.tensor_parallel)
    return positions * _HEAD_BYTES * (layout.tensor_parallel > 1) + gradient


def tensor_traffic(placement: Placement, stage: int, workload: Workload, layout: Layout) -> float:
    """All tensor-parallel traffic of one micro-batch on a stage."""
    if layout.tensor_parallel == 1:
        return 0.0
    passes = 3 if layout.activation_checkpointing else 2
    total = 0.0
    for network in placement.networks:
        shape = shape_of(workload, network)
        total += passes * placement.stages[stage].num_layers(network) * layer_traffic(shape, workload, layout)
    if placement.stages[stage].has_embeddings:
        tokens = layout.micro_batch_size * workload.seq_length
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
    inventory: Inventory, layout: Layout, workload: Workload, num_backward_calls: int, num_micro_batches: int
) -> tuple[float, float]:
    """Gradients and parameters that the data-parallel ranks exchange in one step.

    ZeRO-1 reduces gradients once a step (in fp32 for bf16 weights), ZeRO-2 and 3 at every backward call. ZeRO-1 and 2
    gather the weights once a step, ZeRO-3 for every forward and every backward of a micro-batch.
    """
    weights = inventory.count * workload.number_bytes
    gather = scatter(weights, layout.data_parallel)
    if layout.zero_stage == 1:
        sums = inventory.count * 4
        return all_reduce(sums, layout.data_parallel), gather
    reductions = num_backward_calls * scatter(weights, layout.data_parallel)
    if layout.zero_stage == 2:
        return reductions, gather
    return reductions, 2 * num_micro_batches * gather


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
