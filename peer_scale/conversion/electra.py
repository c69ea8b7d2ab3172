"""Our parameter names and those of Hugging Face's ELECTRA and BERT, one explicit map.

A network of ours is an `ElectraModel` or a `BertModel`; what stands on top of it the objective maps itself
(`peer_scale.objectives.exports`). Shared layers and embeddings stand in each network. One map serves both directions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, ElectraConfig

from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.exports import Entry, Export, dense_entries, first, same, vocabulary_entry

# Names under which some files hold a tensor once more, and the names that are taken.
TIES = {
    "ElectraForMaskedLM": {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    "BertForMaskedLM": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
}


def electra_config(config: ModelConfig, shape: EncoderShape, pad_token_id: int, **more: Any) -> ElectraConfig:
    """Make Hugging Face's configuration of one network; `shape` is that of all layers."""
    return ElectraConfig(embedding_size=config.embedding_size, **encoder_settings(config, shape, pad_token_id), **more)


def bert_config(config: ModelConfig, shape: EncoderShape, pad_token_id: int, **more: Any) -> BertConfig:
    """Make Hugging Face's configuration; it has one size for embeddings and hidden states, so ours must be equal."""
    assert config.embedding_size == shape.hidden_size, "BERT has no projection"
    return BertConfig(**encoder_settings(config, shape, pad_token_id), **more)


def encoder_settings(config: ModelConfig, shape: EncoderShape, pad_token_id: int) -> dict[str, Any]:
    """Give what ElectraConfig and BertConfig have in common, by their names."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "intermediate_size": shape.ffn_hidden_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.num_token_types,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.layer_norm_eps,
        "pad_token_id": pad_token_id,
    }


def encoder_entries(export: Export, config: ModelConfig, shape: EncoderShape) -> list[Entry]:
    """Map the export's network, and the layers above it, to the encoder; `shape` is that of all layers."""
    theirs, network = export.family, export.network
    names = f"{theirs}.embeddings"
    entries = [
        vocabulary_entry("embeddings.word.weight", f"{names}.word_embeddings.weight", config.vocab_size),
        Entry("embeddings.position.weight", (f"{names}.position_embeddings.weight",), same, first),
        Entry("embeddings.token_type.weight", (f"{names}.token_type_embeddings.weight",), same, first),
        *dense_entries("embeddings.norm", f"{names}.LayerNorm"),
    ]
    if config.embedding_size != shape.hidden_size:
        entries += dense_entries(f"{network}.projection", f"{theirs}.embeddings_project")
    for index, ours in enumerate(export.layer_names(config, shape)):
        entries += _layer_entries(ours, f"{theirs}.encoder.layer.{index}", shape)
    return entries


def _layer_entries(ours: str, theirs: str, shape: EncoderShape) -> list[Entry]:
    attention = f"{theirs}.attention"
    parts = [f"{attention}.self.{part}" for part in ("query", "key", "value")]
    split, join = _split_qkv(shape), _join_qkv(shape)
    return [
        *(
            Entry(f"{ours}.attention.qkv.{kind}", tuple(f"{part}.{kind}" for part in parts), split, join)
            for kind in ("weight", "bias")
        ),
        *dense_entries(f"{ours}.attention.dense", f"{attention}.output.dense"),
        *dense_entries(f"{ours}.attention_norm", f"{attention}.output.LayerNorm"),
        *dense_entries(f"{ours}.feed_forward.up", f"{theirs}.intermediate.dense"),
        *dense_entries(f"{ours}.feed_forward.down", f"{theirs}.output.dense"),
        *dense_entries(f"{ours}.feed_forward_norm", f"{theirs}.output.LayerNorm"),
    ]


def _split_qkv(shape: EncoderShape) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Split our rows, ordered [head, (q, k, v), head size], into their three matrices of [head, head size]."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        fused = tensor.view(shape.num_attention_heads, 3, shape.head_size, *tensor.shape[1:])
        return tuple(part.flatten(0, 1) for part in torch.unbind(fused, dim=1))

    return split


def _join_qkv(shape: EncoderShape) -> Callable[[tuple[Tensor, ...]], Tensor]:
    def join(parts: tuple[Tensor, ...]) -> Tensor:
        heads = [part.view(shape.num_attention_heads, shape.head_size, *part.shape[1:]) for part in parts]
        return torch.stack(heads, dim=1).flatten(0, 2)

    return join
