"""Our parameter names and those of Hugging Face's ModernBERT, one explicit map.

A pre-norm network with rotary positions and gated feed-forward blocks is a `ModernBertModel`; what stands on top of it
the objective maps itself (`peer_scale.objectives.exports`). Shared layers and embeddings stand in each network.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import ModernBertConfig

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.exports import Entry, Export, dense_entries, norm_entries, vocabulary_entry

PREFIX = "model"
TIES = {"ModernBertForMaskedLM": {"decoder.weight": f"{PREFIX}.embeddings.tok_embeddings.weight"}}
ACTIVATIONS = {"geglu": "gelu", "swiglu": "silu"}
"""Theirs, which is of the gate, by ours, which is of both halves."""
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_DEFAULT_WINDOW = 128  # of ModernBertConfig, which has one even where no layer uses it


def modern_bert_config(config: ModelConfig, shape: EncoderShape, pad_token_id: int, **more: Any) -> ModernBertConfig:
    """Make Hugging Face's configuration of one network; `shape` is that of all layers.

    Our dropout after the feed-forward block is put where ModernBERT has one: within that block.
    """
    windows = [config.window_of(number) for number in range(shape.num_layers)]
    bases = {_GLOBAL: config.rotary_base, _LOCAL: config.local_rotary_base or config.rotary_base}
    no_tokens: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))
    rope_parameters: dict[Any, Any] = {
        kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
    }
    return ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        intermediate_size=shape.ffn_hidden_size,
        hidden_activation=ACTIVATIONS[config.activation],
        max_position_embeddings=config.max_position_embeddings,
        local_attention=config.attention_window or _DEFAULT_WINDOW,
        layer_types=[_GLOBAL if window is None else _LOCAL for window in windows],
        rope_parameters=rope_parameters,
        embedding_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        mlp_dropout=config.hidden_dropout,
        attention_bias=config.linear_bias,
        mlp_bias=config.linear_bias,
        classifier_bias=config.linear_bias,
        decoder_bias=True,
        norm_bias=config.norm_bias,
        norm_eps=config.layer_norm_eps,
        initializer_range=config.init_std,
        pad_token_id=pad_token_id,
        **no_tokens,
        **more,
    )


def encoder_entries(export: Export, config: ModelConfig, shape: EncoderShape) -> list[Entry]:
    """Map the export's network, and the layers above it, to the encoder; `shape` is that of all layers."""
    embeddings = f"{PREFIX}.embeddings"
    entries = [
        vocabulary_entry("embeddings.word.weight", f"{embeddings}.tok_embeddings.weight", config.vocab_size),
        *norm_entries("embeddings.norm", f"{embeddings}.norm", config),
    ]
    for index, ours in enumerate(export.layer_names(config, shape)):
        entries += _layer_entries(ours, f"{PREFIX}.layers.{index}", config, shape, is_first=index == 0)
    return [*entries, *norm_entries(export.last_norm, f"{PREFIX}.final_norm", config)]


def model_fields(config: Any) -> dict[str, Any]:
    """Say what Hugging Face's configuration says of `ModelConfig`, its dropout left out."""
    kinds = config.layer_types
    bases = {kind: config.rope_parameters[kind]["rope_theta"] for kind in (_GLOBAL, _LOCAL)}
    has_local = _LOCAL in kinds
    return {
        "embedding_size": config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_token_types": 0,
        "position_embedding": "rotary",
        "rotary_base": bases[_GLOBAL],
        "local_rotary_base": bases[_LOCAL] if has_local else None,
        "attention_window": config.local_attention if has_local else None,
        **({"global_attention_every_n": _distance_of_global_layers(kinds)} if has_local else {}),
        "norm": "layer_norm",
        "norm_position": "pre",
        "norm_bias": config.norm_bias,
        "activation": {theirs: ours for ours, theirs in ACTIVATIONS.items()}[config.hidden_activation],
        "linear_bias": config.attention_bias,
        "layer_norm_eps": config.norm_eps,
    }


def _distance_of_global_layers(kinds: list[str]) -> int:
    """Give N where the layers 0, N, 2N, ... see the whole sequence."""
    others = [number for number, kind in enumerate(kinds) if number and kind == _GLOBAL]
    return others[0] if others else len(kinds)


def problem(config: Any) -> str | None:
    """Say which setting of Hugging Face's configuration the models here do not have; None where they have all."""
    kinds = config.layer_types
    every = _distance_of_global_layers(kinds)
    in_turn = [_LOCAL if number % every else _GLOBAL for number in range(len(kinds))]
    biases = {config.attention_bias, config.mlp_bias, config.classifier_bias}
    rope_types = {config.rope_parameters[kind]["rope_type"] for kind in (_GLOBAL, _LOCAL)}
    checks = {
        f"hidden_activation is {config.hidden_activation!r}": config.hidden_activation not in ACTIVATIONS.values(),
        f"classifier_activation is {config.classifier_activation!r}": config.classifier_activation != "gelu",
        "attention_bias, mlp_bias and classifier_bias differ": len(biases) > 1,
        "decoder_bias is false": not config.decoder_bias,
        "rope_parameters scale the positions": rope_types != {"default"},
        f"local_attention is {config.local_attention}, an odd number": _LOCAL in kinds and config.local_attention % 2,
        "layer_types have no global layer first, or not every so many": kinds != in_turn,
    }
    return next((text for text, is_so in checks.items() if is_so), None)


def _layer_entries(ours: str, theirs: str, config: ModelConfig, shape: EncoderShape, *, is_first: bool) -> list[Entry]:
    has_bias = config.linear_bias
    kinds = ("weight", "bias") if has_bias else ("weight",)

    def split(tensor: Tensor) -> tuple[Tensor]:
        """Put our rows, ordered [head, (q, k, v), head size], into the order [(q, k, v), head, head size]."""
        fused = tensor.view(shape.num_attention_heads, 3, shape.head_size, *tensor.shape[1:])
        return (fused.transpose(0, 1).flatten(0, 2),)

    def join(tensors: tuple[Tensor, ...]) -> Tensor:
        fused = tensors[0].view(3, shape.num_attention_heads, shape.head_size, *tensors[0].shape[1:])
        return fused.transpose(0, 1).flatten(0, 2)

    def flatten(tensor: Tensor) -> tuple[Tensor]:
        """Put the rows of the gate before those of the value."""
        return (tensor.flatten(0, 1),)

    def unflatten(tensors: tuple[Tensor, ...]) -> Tensor:
        return tensors[0].unflatten(0, (2, -1))

    entries = [
        *(Entry(f"{ours}.attention.qkv.{kind}", (f"{theirs}.attn.Wqkv.{kind}",), split, join) for kind in kinds),
        *dense_entries(f"{ours}.attention.dense", f"{theirs}.attn.Wo", has_bias=has_bias),
        *(Entry(f"{ours}.feed_forward.up.{kind}", (f"{theirs}.mlp.Wi.{kind}",), flatten, unflatten) for kind in kinds),
        *dense_entries(f"{ours}.feed_forward.down", f"{theirs}.mlp.Wo", has_bias=has_bias),
        *norm_entries(f"{ours}.feed_forward_norm", f"{theirs}.mlp_norm", config),
    ]
    if not is_first:
        entries += norm_entries(f"{ours}.attention_norm", f"{theirs}.attn_norm", config)
    return entries
