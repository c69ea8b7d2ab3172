"""Encoders of other blocks in the benchmark: ours and transformers' of the same sizes, forward and backward.

One network of the sizes of the preset's main one, without a head. Neither side has dropout: they drop at different
places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench_peers import PaddedBatch, PeerStep, Setting
from bench_turns import over_batches
from peer_scale.conversion.modern_bert import modern_bert_config
from peer_scale.models.config import ModelConfig
from peer_scale.models.networks import PretrainingModel
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.tensor_parallel import TensorParallel
from peer_scale.samples.examples import Batch

_BOTH: dict[str, Any] = {
    "ranker": None,
    "num_shared_layers": 0,
    "num_token_types": 0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "norm_position": "pre",
    "linear_bias": False,
}
_BLOCKS: dict[str, dict[str, Any]] = {
    "modernbert": {
        "position_embedding": "rotary",
        "rotary_base": 160000.0,
        "local_rotary_base": 10000.0,
        "attention_window": 128,
        "norm_bias": False,
        "activation": "geglu",
        "layer_norm_eps": 1e-5,
    },
    "t5-bias": {
        "position_embedding": "t5_bias",
        "norm": "rms_norm",
        "activation": "swiglu",
        "layer_norm_eps": 1e-6,
    },
}


def with_blocks(name: str, model: ModelConfig) -> ModelConfig:
    """Give one network of the sizes of the model's main one, built of other blocks: "modernbert" or "t5-bias"."""
    shape = model.main_network
    return replace(model, generator=shape, embedding_size=shape.hidden_size, **_BOTH, **_BLOCKS[name])


def our_encoder(model: ModelConfig, tensor_parallel: TensorParallel, seed: int) -> PretrainingModel:
    """Build our encoder with its initial weights."""
    encoder = PretrainingModel(model, model.networks, {}, tensor_parallel)
    initialize_weights(
        encoder, seed=seed, std=model.init_std, vocab_size=model.vocab_size, tensor_parallel=tensor_parallel
    )
    return encoder


def their_encoder(name: str, model: ModelConfig) -> nn.Module:
    """Build transformers' encoder of the same sizes.

    T5 has one table of biases for all layers and computes it once, where ours has one for each layer. It does not scale
    the scores, and normalizes before the first attention what ours normalizes as part of the embeddings.
    """
    from transformers import ModernBertModel, T5Config, T5EncoderModel

    shape = model.generator
    if name == "modernbert":
        config = modern_bert_config(model, shape, 0)
        config._attn_implementation = "sdpa"
        return ModernBertModel(config)
    return T5EncoderModel(
        T5Config(
            vocab_size=model.vocab_size,
            d_model=shape.hidden_size,
            d_kv=shape.head_size,
            d_ff=shape.ffn_hidden_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_attention_heads,
            relative_attention_num_buckets=model.relative_attention_num_buckets,
            relative_attention_max_distance=model.relative_attention_max_distance,
            dropout_rate=0.0,
            layer_norm_epsilon=model.layer_norm_eps,
            feed_forward_proj="gated-silu",
        )
    )


def our_pass(name: str, setting: Setting, dtype: torch.dtype) -> Callable[[], object]:
    """Forward and backward of our encoder over the batches in turns, its weights in `dtype`."""
    model, device = with_blocks(name, setting.run.model), setting.topology.device
    encoder = our_encoder(model, setting.topology.tensor_parallel, setting.run.seed).to(device, dtype)
    direction = _direction(model, device, dtype)

    def step(batch: Batch) -> None:
        hidden = encoder.encode("generator", batch.input_ids, batch.token_types, batch.sequences)
        (hidden @ direction).sum().backward()
        encoder.zero_grad()

    return over_batches(step, setting.batches)


def their_pass(name: str, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> PeerStep:
    """Forward and backward of transformers' encoder, its weights in `dtype`; `model` is that of the preset."""
    model = with_blocks(name, model)
    encoder = their_encoder(name, model).to(device, dtype).train()
    direction = _direction(model, device, dtype)

    def step(batch: PaddedBatch) -> None:
        hidden = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).last_hidden_state
        ((hidden @ direction) * batch.attention_mask).sum().backward()
        encoder.zero_grad()

    return step


def _direction(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Make what each hidden state is multiplied with: the gradient of a plain sum would vanish in the last norm."""
    return torch.randn(model.generator.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
