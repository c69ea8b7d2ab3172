"""What a rank holds: state as DeepSpeed lays it out, exact to the byte, and activations as the layers keep them.

Activations are those of the run's fullest micro-batch, see `Workload.fullest_micro_batch`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from peer_scale.models.config import EncoderShape
from peer_scale.parallel.buckets import bucket_sizes
from peer_scale.pipeline.placement import Placement
from peer_scale.planning.inventory import Inventory
from peer_scale.planning.layout import ParallelLayout, Workload
from peer_scale.planning.stage_works import StageWork, stage_works

_ALIGNMENT = 2  # DeepSpeed pads a group of parameters so that each rank's share is a multiple of this


@dataclass(frozen=True)
class State:
    """Bytes per rank that stay throughout a step; gradients are what is kept between two backward calls."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def state_memory(inventory: Inventory, layout: ParallelLayout, precision: str) -> State:
    """Count the state under AdamW with fp32 master weights and fp32 gradient sums.

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
    """Give the sizes of the two flat groups that ZeRO-1 and 2 make of the parameters."""
    decayed, others = (_round_up(sum(group), _ALIGNMENT * ranks) for group in (inventory.decayed, inventory.others))
    return decayed, others


def gathered_memory(inventory: Inventory, layout: ParallelLayout, workload: Workload, live_parameters: int) -> int:
    """Count the bytes of parameters that ZeRO-3 has gathered at once: about `live_parameters` and the next layer."""
    if layout.zero_stage < 3:
        return 0
    return workload.number_bytes * min(inventory.count, live_parameters)


def bucket_memory(inventory: Inventory, layout: ParallelLayout) -> int:
    """Count the bytes of ZeRO's bucket of gradients, in fp32 at most, and of the one that is filled meanwhile."""
    return 2 * 4 * bucket_sizes(inventory.count, layout.data_parallel, on_gpu=True).reduce


def layer_activations(shape: EncoderShape, workload: Workload, layout: ParallelLayout, *, on_cpu: bool = False) -> int:
    """Count the bytes that one layer keeps of one micro-batch from forward to backward.

    Of width H: inputs of QKV and of the feed-forward block and the sums before the two LayerNorms, which
    tensor-parallel ranks keep whole, or split under sequence parallelism; query, key, value and the attention's output,
    split by heads. Of width F: the feed-forward block's activations before and after GELU, or its gate and value and
    their product. On a CPU there are the attention probabilities and dropout's masks besides; a GPU's kernels compute
    and draw them again.
    """
    size, ranks = workload.fullest_micro_batch(layout), layout.tensor_parallel
    tokens, token_pairs = size.tokens, size.token_pairs
    hidden = shape.hidden_size
    scatter_along_sequence = ranks if layout.sequence_parallel else 1
    if layout.activation_checkpointing:
        return int(tokens * hidden * workload.number_bytes // scatter_along_sequence)
    sums = 2.0
    probabilities = 0.0
    if on_cpu:
        sums += 2 * (workload.model.hidden_dropout > 0)
        per_pair = shape.num_attention_heads / ranks * (1 + (workload.model.attention_dropout > 0))
        probabilities = per_pair * token_pairs
    split = 4 * hidden + (3 if workload.model.is_gated else 2) * shape.ffn_hidden_size
    per_token = (2 + sums) * hidden / scatter_along_sequence + split / ranks
    return int((tokens * per_token + probabilities) * workload.number_bytes)


def work_activations(part: StageWork, workload: Workload, layout: ParallelLayout, *, on_cpu: bool = False) -> int:
    """Count the bytes that a stage keeps of one micro-batch's work from forward to backward: layers and what is beside.

    A work without a backward keeps nothing.
    """
    if not part.work.has_backward:
        return 0
    numbers = workload.fullest_micro_batch(layout).count(part.costs, "activations")
    held = round(numbers * workload.number_bytes)
    if part.shape is not None:
        held += part.num_layers * layer_activations(part.shape, workload, layout, on_cpu=on_cpu)
    return held


def heads_memory(placement: Placement, stage: int, workload: Workload, layout: ParallelLayout) -> int:
    """Count the bytes of what a stage does beside its layers: what one work at a time needs while it is run.

    With it what works beside the word table keep from forward to backward, which follow each other closely: they are
    counted for one micro-batch, while what a network's work keeps is counted for all that are in flight.
    """
    parts, size = stage_works(placement, stage), workload.fullest_micro_batch(layout)
    workspace = max((size.count(part.costs, "workspace") for part in parts), default=0.0)
    kept = sum(work_activations(part, workload, layout) for part in parts if part.shape is None)
    return kept + round(workspace * (workload.number_bytes + 4))


def recomputed_layer(workload: Workload, layout: ParallelLayout) -> int:
    """Count the bytes that backward needs for the one layer that activation checkpointing has it run again."""
    if not layout.activation_checkpointing:
        return 0
    whole = replace(layout, activation_checkpointing=False)
    return max(layer_activations(shape, workload, whole) for _, shape in workload.graph.networks)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
