"""What a rank holds: state as DeepSpeed lays it out, exact to the byte, and activations as the layers keep them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peer_scale.models.config import EncoderShape
from peer_scale.pipeline.instructions import Network
from peer_scale.pipeline.placement import Placement
from peer_scale.planning.inventory import Inventory
from peer_scale.planning.layout import Layout, Workload

_ALIGNMENT = 2  # DeepSpeed pads a group of parameters so that each rank's share is a multiple of this


@dataclass(frozen=True)
class State:
    """Bytes on one rank that stay throughout a step; gradients are what is kept between two backward calls."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def state_memory(inventory: Inventory, layout: Layout, precision: str) -> State:
    """State under AdamW with fp32 master weights and fp32 gradient sums.

    - ZeRO-1: all parameters and all gradients; fp32 master weights and both moments of the rank's share.
    - ZeRO-2: of the gradients only the rank's share; pipeline stages, whose backward calls reach different parameters,
      keep up to twice that between calls, which is not counted.
    - ZeRO-3: a share of every parameter, cut one by one; `stage3_param_persistence_threshold` adds what stays gathered.
    """
    low = 4 if precision == "fp32" else 2
    ranks = layout.data_parallel
    if layout.zero_stage == 3:
        share = sum(-(-size // ranks) for size in (*inventory.decayed, *inventory.others))
        return State(low * share, 4 * share, 12 * share)
    padded = sum(padded_groups(inventory, ranks))
    parameters, optimizer = low * padded, 12 * padded // ranks
    if layout.zero_stage == 2:
        return State(parameters, 4 * padded // ranks, optimizer)
    if precision == "fp32":
        return State(parameters, 4 * inventory.count, optimizer)
    # DeepSpeed's BF16_Optimizer adds bf16 gradients into an fp32 buffer
    return State(parameters, 4 * padded + low * inventory.count, optimizer)


def padded_groups(inventory: Inventory, ranks: int) -> tuple[int, int]:
    """Sizes of the two flat groups that ZeRO-1 and 2 make of the parameters."""
    decayed, others = (_round_up(sum(group), _ALIGNMENT * ranks) for group in (inventory.decayed, inventory.others))
    return decayed, others


def gathered_memory(inventory: Inventory, layout: Layout, workload: Workload, live_parameters: int) -> int:
    """Bytes of parameters that ZeRO-3 has gathered at once: about `live_parameters` and the next layer."""
    if layout.zero_stage < 3:
        return 0
    return workload.number_bytes * min(inventory.count, live_parameters)


def layer_activations(shape: EncoderShape, workload: Workload, layout: Layout, *, on_cpu: bool = False) -> int:
    """Bytes that one layer keeps of one micro-batch from forward to backward.

    Of width H: inputs of QKV and of the feed-forward block, which tensor-parallel ranks keep whole; the sums before the
    two LayerNorms, split by sequence parallelism; query, key, value and the attention's output, split by heads. Of
    width F: the feed-forward block's activations before and after GELU. On a CPU there are the attention probabilities
    and dropout's masks besides; a GPU's kernels compute and draw them again.
    """
    tokens = layout.micro_batch_size * workload.seq_length
    hidden, size = shape.hidden_size, layout.tensor_parallel
    if layout.activation_checkpointing:
        return tokens * hidden * workload.number_bytes // (size if layout.sequence_parallel else 1)
    split_sequence = size if layout.sequence_parallel else 1
    sums = 2.0
    probabilities = 0.0
    if on_cpu:
        sums += 2 * (workload.model.hidden_dropout > 0)
        a_token = shape.num_attention_heads * workload.seq_length / size
        probabilities = a_token * (1 + (workload.model.attention_dropout > 0))
    numbers = 2 * hidden + sums * hidden / split_sequence + (4 * hidden + 2 * shape.ffn_hidden_size) / size
    return int(tokens * (numbers + probabilities) * workload.number_bytes)


def head_activations(workload: Workload, layout: Layout) -> int:
    """Bytes of the MLM head while it is run: states of the selected positions and one chunk of logits, twice."""
    positions = layout.micro_batch_size * workload.num_predictions
    sizes = workload.model.generator.hidden_size + 3 * workload.model.embedding_size
    return positions * (sizes * workload.number_bytes + 2 * 2048 * (workload.number_bytes + 4))


def pass_activations(
    placement: Placement, stage: int, network: Network, workload: Workload, layout: Layout, *, on_cpu: bool = False
) -> int:
    """Bytes that `stage` keeps of one micro-batch's pass through `network`: layers, embeddings and ranking head."""
    shape = workload.model.generator if network == "generator" else workload.model.ranker
    assert shape is not None, "a pass needs its network"
    part = placement.stages[stage]
    held = part.num_layers(network) * layer_activations(shape, workload, layout, on_cpu=on_cpu)
    tokens = layout.micro_batch_size * workload.seq_length
    if part.has_embeddings:
        kept = 1 + (workload.model.hidden_dropout > 0)
        held += kept * tokens * workload.model.embedding_size * workload.number_bytes
    if network == "ranker" and part.has_ranking_head:
        held += 3 * tokens * shape.hidden_size * workload.number_bytes
    return held


def recomputed_layer(workload: Workload, layout: Layout) -> int:
    """Bytes that backward needs for the one layer whose forward it runs again under activation checkpointing."""
    if not layout.activation_checkpointing:
        return 0
    whole = replace(layout, activation_checkpointing=False)
    shapes = (workload.model.generator, workload.model.ranker)
    return max(layer_activations(shape, workload, whole) for shape in shapes if shape is not None)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
