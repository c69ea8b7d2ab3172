"""Our parameter names and Hugging Face's ELECTRA names, one explicit map.

A network of ours becomes an `ElectraModel` with its head: the ranker an ElectraForPreTraining, the generator an
ElectraForMaskedLM. Shared layers and embeddings are written into each.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ElectraConfig

from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig


class Entry(NamedTuple):
    """One of our parameters, and what it becomes: Hugging Face names and the tensors for them."""

    ours: str
    theirs: tuple[str, ...]
    convert: Callable[[Tensor], tuple[Tensor, ...]]


def ranker_entries(config: ModelConfig) -> list[Entry]:
    """The map to ElectraForPreTraining. Its logit for "replaced" is -w.h + xi_{K-1} (Eq. 3)."""
    if config.ranker is None:
        raise UserError("this checkpoint is of a BERT model: it has no ranker, only a generator")
    head = "discriminator_predictions"
    return [
        *encoder_entries(config, config.ranker, "ranker"),
        *dense_entries("ranking_head.dense", f"{head}.dense"),
        Entry("ranking_head.score.weight", (f"{head}.dense_prediction.weight",), lambda w: (-w,)),
        Entry("ranking_head.free_thresholds", (f"{head}.dense_prediction.bias",), lambda xi: (xi[-1:],)),
    ]


def generator_entries(config: ModelConfig) -> list[Entry]:
    """The map to ElectraForMaskedLM; its output matrix is tied to the word embeddings."""
    cut = without_padding(config.vocab_size)
    return [
        *encoder_entries(config, config.generator, "generator"),
        *dense_entries("mlm_head.dense", "generator_predictions.dense"),
        *dense_entries("mlm_head.norm", "generator_predictions.LayerNorm"),
        Entry("mlm_head.bias", ("generator_lm_head.bias",), cut),
        Entry("embeddings.word.weight", ("generator_lm_head.weight",), cut),
    ]


def convert(state: Mapping[str, Tensor], entries: list[Entry]) -> dict[str, Tensor]:
    """Hugging Face's state of the entries; UserError naming a parameter that `state` lacks."""
    converted: dict[str, Tensor] = {}
    for entry in entries:
        if entry.ours not in state:
            raise UserError(f"the checkpoint lacks the parameter {entry.ours}")
        tensors = entry.convert(state[entry.ours])
        converted.update((name, t.clone().contiguous()) for name, t in zip(entry.theirs, tensors, strict=True))
    return converted


def electra_config(config: ModelConfig, shape: EncoderShape, pad_token_id: int) -> ElectraConfig:
    """Hugging Face's configuration of one network."""
    return ElectraConfig(embedding_size=config.embedding_size, **encoder_settings(config, shape, pad_token_id))


def encoder_settings(config: ModelConfig, shape: EncoderShape, pad_token_id: int) -> dict[str, Any]:
    """What ElectraConfig and BertConfig have in common, by their names."""
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


def encoder_entries(config: ModelConfig, shape: EncoderShape, network: str, theirs: str = "electra") -> list[Entry]:
    """The map of `network` ("generator" or "ranker") to the encoder that Hugging Face's model keeps under `theirs`."""
    names = f"{theirs}.embeddings"
    entries = [
        Entry("embeddings.word.weight", (f"{names}.word_embeddings.weight",), without_padding(config.vocab_size)),
        Entry("embeddings.position.weight", (f"{names}.position_embeddings.weight",), _same),
        Entry("embeddings.token_type.weight", (f"{names}.token_type_embeddings.weight",), _same),
        *dense_entries("embeddings.norm", f"{names}.LayerNorm"),
    ]
    if config.embedding_size != shape.hidden_size:
        entries += dense_entries(f"{network}.projection", f"{theirs}.embeddings_project")
    for index in range(shape.num_layers):
        own = index - config.num_shared_layers
        ours = f"{network}.layers.{own}" if own >= 0 else f"shared_layers.{index}"
        entries += _layer_entries(ours, f"{theirs}.encoder.layer.{index}", shape)
    return entries


def _layer_entries(ours: str, theirs: str, shape: EncoderShape) -> list[Entry]:
    attention = f"{theirs}.attention"
    parts = [f"{attention}.self.{part}" for part in ("query", "key", "value")]
    split = _split_qkv(shape)
    return [
        *(
            Entry(f"{ours}.attention.qkv.{kind}", tuple(f"{part}.{kind}" for part in parts), split)
            for kind in ("weight", "bias")
        ),
        *dense_entries(f"{ours}.attention.dense", f"{attention}.output.dense"),
        *dense_entries(f"{ours}.attention_norm", f"{attention}.output.LayerNorm"),
        *dense_entries(f"{ours}.feed_forward.up", f"{theirs}.intermediate.dense"),
        *dense_entries(f"{ours}.feed_forward.down", f"{theirs}.output.dense"),
        *dense_entries(f"{ours}.feed_forward_norm", f"{theirs}.output.LayerNorm"),
    ]


def dense_entries(ours: str, theirs: str) -> list[Entry]:
    """A weight and its bias, as they are."""
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), _same) for kind in ("weight", "bias")]


def _same(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def without_padding(rows: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Leaves out the rows that only pad the vocabulary."""
    return lambda tensor: (tensor[:rows],)


def _split_qkv(shape: EncoderShape) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Our rows are ordered [head, (q, k, v), head size]; theirs are three matrices of [head, head size]."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        fused = tensor.view(shape.num_attention_heads, 3, shape.head_size, *tensor.shape[1:])
        return tuple(part.flatten(0, 1) for part in torch.unbind(fused, dim=1))

    return split
