"""Numbers that a GPU's element-wise kernels read and write: what a layer takes beside products and attention.

Counted kernel by kernel of what runs on an NVIDIA GPU (`kernels/triton_*.py`, torch's own elsewhere), per token and
tensor-parallel rank, in numbers of the compute format. Statistics of rows, parameters and their gradients are left out.
"""

from __future__ import annotations

from typing import NamedTuple

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.planning.layout import ParallelLayout


class Moved(NamedTuple):
    """Numbers per token, read and written together."""

    forward: float
    backward: float


def layer_moved(model: ModelConfig, shape: EncoderShape, layout: ParallelLayout) -> Moved:
    """Count one layer.

    What lies between its split matrices is divided among tensor-parallel ranks; the rest only under sequence
    parallelism.
    """
    ranks = layout.tensor_parallel
    slices = ranks if layout.sequence_parallel else 1
    around, within = _block_ends(model), _attention(model)
    activation = _activation(model)
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return Moved(
        hidden * (2 * around.forward / slices + within.forward / ranks) + ffn * activation.forward / ranks,
        hidden * (2 * around.backward / slices + within.backward / ranks) + ffn * activation.backward / ranks,
    )


def _attention(model: ModelConfig) -> Moved:
    """Count what is done to the QKV product before the attention kernel and to its output after it, in hidden sizes."""
    forward = 2.0  # the output is copied
    backward = 2.0 + 6  # so is its gradient; those of query, key and value are put together
    if model.linear_bias:
        forward += 6  # added to the product
        backward += 3  # summed up
    if model.position_embedding == "rotary":
        # of queries and keys, in fp32, which is two numbers each: four products, two sums, two copies back
        turning = 4 * (1 + 2) + 2 * (4 + 2) + 2 * (2 + 1)
        forward += turning
        backward += 6 + turning  # of a copy
    return Moved(forward, backward)


def _block_ends(model: ModelConfig) -> Moved:
    """Count one of the two sums of a block's output and its input with its norm, in hidden sizes."""
    branches = 3  # backward: the gradients of the block and of the residual are added
    if not model.is_pre_norm and model.linear_bias and model.has_norm_bias:
        # one kernel: output, residual -> normalized, sum; gradient, sum -> both gradients
        return Moved(4, 4 + branches)
    forward, backward = 3.0, 0.0  # the sum, whose gradient is both terms'
    if model.linear_bias:
        forward, backward = forward + 2, backward + 1
    if model.hidden_dropout > 0:
        forward, backward = forward + 1 + 3, backward + 3  # a mask is drawn, and multiplied
    return Moved(forward + 2, backward + 3 + branches)


def _activation(model: ModelConfig) -> Moved:
    """Count the middle of the feed-forward block, in its inner sizes."""
    if not model.is_gated:
        return Moved(2, 3)
    bias = (4, 2) if model.linear_bias else (0, 0)  # added to gate and value; its gradient summed up
    # gate -> activated; that times value. Backward: activated again, and of gate and value one product each
    return Moved(2 + 3 + bias[0], 2 + 3 + 3 + 3 + 2 + bias[1])
