"""Our parameter names and those of Hugging Face's ELECTRA and BERT, one explicit map.

A network of ours is an `ElectraModel` with its head: the ranker an ElectraForPreTraining, the generator an
ElectraForMaskedLM; a BERT checkpoint of ours is a BertForMaskedLM. Shared layers and embeddings stand in each. One map
serves both directions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BertConfig, ElectraConfig

from peer_scale.models.config import EncoderShape, ModelConfig

# Names under which some files hold a tensor once more, and the names that are taken.
TIES = {
    "electra": {"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
}

RANKER_HEAD = "discriminator_predictions"


class Entry(NamedTuple):
    """One of our parameters and what it is at Hugging Face: names there, and the way to the tensors and back."""

    ours: str
    theirs: tuple[str, ...]
    convert: Callable[[Tensor], tuple[Tensor, ...]]
    restore: Callable[[tuple[Tensor, ...]], Tensor]


def ranking_head_entries() -> list[Entry]:
    """The head of ElectraForPreTraining, whose logit for "replaced" is -w.h + xi_{K-1} (Eq. 3).

    Of the thresholds it has the last only.
    """
    score = f"{RANKER_HEAD}.dense_prediction"
    return [
        *dense_entries("ranking_head.dense", f"{RANKER_HEAD}.dense"),
        Entry("ranking_head.score.weight", (f"{score}.weight",), lambda w: (-w,), lambda t: -t[0]),
        Entry("ranking_head.free_thresholds", (f"{score}.bias",), lambda xi: (xi[-1:],), _first),
    ]


def mlm_head_entries(config: ModelConfig) -> list[Entry]:
    """The head of ElectraForMaskedLM; its output matrix is the word embeddings (`TIES`)."""
    cut = without_padding(config.vocab_size)
    return [
        *dense_entries("mlm_head.dense", "generator_predictions.dense"),
        *dense_entries("mlm_head.norm", "generator_predictions.LayerNorm"),
        Entry("mlm_head.bias", ("generator_lm_head.bias",), cut, lambda t: cut(t[0])[0]),
    ]


def bert_mlm_head_entries(config: ModelConfig) -> list[Entry]:
    """The head of BertForMaskedLM; its output matrix is the word embeddings (`TIES`)."""
    cut = without_padding(config.vocab_size)
    return [
        *dense_entries("mlm_head.dense", "cls.predictions.transform.dense"),
        *dense_entries("mlm_head.norm", "cls.predictions.transform.LayerNorm"),
        Entry("mlm_head.bias", ("cls.predictions.bias",), cut, lambda t: cut(t[0])[0]),
    ]


def electra_config(config: ModelConfig, shape: EncoderShape, pad_token_id: int, **more: Any) -> ElectraConfig:
    """Hugging Face's configuration of one network."""
    return ElectraConfig(embedding_size=config.embedding_size, **encoder_settings(config, shape, pad_token_id), **more)


def bert_config(config: ModelConfig, pad_token_id: int) -> BertConfig:
    """Hugging Face's configuration; it has one size for embeddings and hidden states, so ours must be equal."""
    assert config.embedding_size == config.generator.hidden_size, "BertForMaskedLM has no projection"
    return BertConfig(**encoder_settings(config, config.generator, pad_token_id))


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
    cut = without_padding(config.vocab_size)
    entries = [
        Entry("embeddings.word.weight", (f"{names}.word_embeddings.weight",), cut, lambda t: cut(t[0])[0]),
        Entry("embeddings.position.weight", (f"{names}.position_embeddings.weight",), _same, _first),
        Entry("embeddings.token_type.weight", (f"{names}.token_type_embeddings.weight",), _same, _first),
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


def dense_entries(ours: str, theirs: str) -> list[Entry]:
    """A weight and its bias, as they are."""
    return [Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), _same, _first) for kind in ("weight", "bias")]


def _same(tensor: Tensor) -> tuple[Tensor, ...]:
    return (tensor,)


def _first(tensors: tuple[Tensor, ...]) -> Tensor:
    return tensors[0]


def without_padding(rows: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Leaves out the rows that only pad the vocabulary."""
    return lambda tensor: (tensor[:rows],)


def _split_qkv(shape: EncoderShape) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Our rows are ordered [head, (q, k, v), head size]; theirs are three matrices of [head, head size]."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        fused = tensor.view(shape.num_attention_heads, 3, shape.head_size, *tensor.shape[1:])
        return tuple(part.flatten(0, 1) for part in torch.unbind(fused, dim=1))

    return split


def _join_qkv(shape: EncoderShape) -> Callable[[tuple[Tensor, ...]], Tensor]:
    def join(parts: tuple[Tensor, ...]) -> Tensor:
        heads = [part.view(shape.num_attention_heads, shape.head_size, *part.shape[1:]) for part in parts]
        return torch.stack(heads, dim=1).flatten(0, 2)

    return join
