"""Manifests of earlier formats, brought to the present one when they are read."""

from __future__ import annotations

from typing import Any

from peer_scale.configuration import settings
from peer_scale.models.config import ModelConfig

_BLOCKS = (
    "position_embedding",
    "rotary_base",
    "local_rotary_base",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "attention_window",
    "global_attention_every_n",
    "norm",
    "norm_position",
    "norm_bias",
    "activation",
    "linear_bias",
    "depth_scaled_init",
    "width_scaled_init",
    "unigram_output_bias",
)


def from_format_2(sections: dict[str, Any]) -> dict[str, Any]:
    """Give the sections of format 2 as format 3 has them.

    There every model had the hyper-parameters of token quality ranking, and masking was among them; the tokenizer's
    digest stood with the data, of which imported weights had nothing else.

    Raises:
        KeyError: a section or a value that format 2 has is missing.
        TypeError: a section is not an object.
    """
    ranking, data = dict(sections["objective"]), dict(sections["data"])
    masking = {key: ranking.pop(key) for key in ("mask_fraction", "mask_probability")}
    tokenizer = {"digest": data.pop("tokenizer")}
    objective = {"kind": "mlm"} if dict(sections["model"])["ranker"] is None else {"kind": "tqr", **ranking}
    changed = {"objective": objective, "masking": masking, "tokenizer": tokenizer, "data": data or None}
    streams = {"streams": "as the version that wrote the checkpoint had them", **sections["random"]}
    return {key: value for key, value in {**sections, **changed, "random": streams}.items() if value is not None}


def with_split(sections: dict[str, Any]) -> dict[str, Any]:
    """Name the rule of the split where the data's section does not: such runs held out by documents."""
    data = sections.get("data")
    return {**sections, "data": {"split": "documents", **data}} if isinstance(data, dict) else sections


def with_blocks(sections: dict[str, Any]) -> dict[str, Any]:
    """Say of a model, where its section does not, that its blocks are BERT's, as all were before there was a choice."""
    model = sections.get("model")
    defaults = {name: settings(ModelConfig)[name].default for name in _BLOCKS}
    return {**sections, "model": {**defaults, **model}} if isinstance(model, dict) else sections
