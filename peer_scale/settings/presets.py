"""Named models with the hyper-parameters they are trained with."""

from dataclasses import dataclass, replace
from typing import Any

from peer_scale.configuration import settings
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.teams import Teams
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.samples.masking import MaskingConfig
from peer_scale.settings.names import hint
from peer_scale.settings.run import RunConfig, TrainingConfig

FIRST_RUN = settings(RunConfig)["name"].default

# The micro-batch sizes are for one 40 GB GPU (tiny: a laptop); the rest is Table 8 of the paper, and for the large size
# and the widths of the narrow generators the ELECTRA paper's Table 6.
_SHAPES = {
    "tiny": EncoderShape(num_layers=4, hidden_size=128, ffn_hidden_size=512, num_attention_heads=2),
    "small": EncoderShape(num_layers=12, hidden_size=256, ffn_hidden_size=1024, num_attention_heads=4),
    "base": EncoderShape(num_layers=12, hidden_size=768, ffn_hidden_size=3072, num_attention_heads=12),
    "large": EncoderShape(num_layers=24, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16),
}
_GENERATOR_DIVISOR = {"tiny": 2, "small": 4, "base": 3, "large": 4}
_TRAINING = {
    "tiny": TrainingConfig(
        seq_length=128,
        train_iters=600,
        micro_batch_size=16,
        global_batch_size=16,
        lr=1e-3,
        lr_warmup_iters=60,
        precision="fp32",
    ),
    "small": TrainingConfig(
        seq_length=128, train_iters=250_000, micro_batch_size=128, global_batch_size=512, lr=7.5e-4
    ),
    "base": TrainingConfig(seq_length=512, train_iters=666_900, micro_batch_size=32, global_batch_size=256, lr=2e-4),
    "large": TrainingConfig(seq_length=512, train_iters=400_000, micro_batch_size=16, global_batch_size=2048, lr=2e-4),
}
_NARROW_EMBEDDING = {"small": 128}
_ITERATIONS = {"electra-base": 766_000, "bert-base": 1_000_000}
_LEARNING_RATES = {"electra-small": 1e-3, "bert-small": 1e-3, "bert-base": 1e-4}


@dataclass(frozen=True)
class Preset:
    """A model, what it learns, and how."""

    model: ModelConfig
    objective: Objective
    masking: MaskingConfig
    training: TrainingConfig


def preset_names() -> list[str]:
    """All names that `find_preset` takes."""
    return [f"{family}-{size}" for family in ("peer", "electra", "bert", "teams") for size in _SHAPES]


def find_preset(name: str) -> Preset:
    """The preset of that name; raises UserError with the nearest one for an unknown name."""
    if name not in preset_names():
        raise UserError(f"--model {name}: unknown{hint(name, preset_names())} (presets: {', '.join(preset_names())})")
    family, size = name.split("-")
    training = replace(
        _TRAINING[size],
        train_iters=_ITERATIONS.get(name, _TRAINING[size].train_iters),
        lr=_LEARNING_RATES.get(name, _TRAINING[size].lr),
    )
    masking = MaskingConfig(mask_fraction=0.25 if name == "electra-large" else 0.15)
    return Preset(_model(family, size), _objective(family, size), masking, training)


def first_run() -> Preset:
    """Give the preset of a run for which no model is named: one that learns within minutes.

    It is `peer-tiny` with what keeps so small a model from staying at word frequencies: docs/small_scale.md says what
    each of these is for, and what comes out. examples/mini.yaml has the same for other data and objectives.
    """
    tiny = find_preset(FIRST_RUN)
    sizes = {"ffn_hidden_size": 352}  # three matrices of this width for GeGLU are two of 512
    model = replace(
        tiny.model,
        generator=replace(tiny.model.generator, **sizes),
        ranker=replace(tiny.model.main_network, **sizes),
        vocab_size=1024,
        position_embedding="rotary",
        norm_position="pre",
        activation="geglu",
        num_token_types=0,
        init_std=0.05,
        unigram_output_bias=True,
    )
    training = replace(tiny.training, seq_length=64, train_iters=2200, lr=3e-3, lr_warmup_iters=100, adam_beta2=0.98)
    return Preset(
        model,
        tiny.objective.changed({"tqr_weight": 10.0, "warmup_epochs": 0.0}),
        MaskingConfig(mask_fraction=0.3, mask_probability=0.85),
        training,
    )


def _model(family: str, size: str) -> ModelConfig:
    shape = _SHAPES[size]
    common: dict[str, Any] = {
        "vocab_size": 8192 if size == "tiny" else 30522,
        "max_position_embeddings": 128 if size == "tiny" else 512,
        "hidden_dropout": 0.0 if size == "tiny" else 0.1,
        "attention_dropout": 0.0 if size == "tiny" else 0.1,
    }
    if family == "bert":
        return ModelConfig(generator=shape, ranker=None, embedding_size=shape.hidden_size, **common)
    if family == "electra":
        divisor = _GENERATOR_DIVISOR[size]
        narrow = EncoderShape(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size // divisor,
            ffn_hidden_size=shape.ffn_hidden_size // divisor,
            num_attention_heads=max(1, shape.num_attention_heads // divisor),
        )
        embedding_size = _NARROW_EMBEDDING.get(size, shape.hidden_size)
        return ModelConfig(generator=narrow, ranker=shape, embedding_size=embedding_size, **common)
    return ModelConfig(
        generator=replace(shape, num_layers=shape.num_layers // 2),
        ranker=shape,
        num_shared_layers=shape.num_layers // 4,
        embedding_size=shape.hidden_size,
        **common,
    )


def _objective(family: str, size: str) -> Objective:
    if family == "bert":
        return MaskedLanguageModel()
    if family == "teams":
        return Teams()
    if family == "electra":
        # every replaced token has label 1: nothing is unknown to a ranker of two levels
        return TokenQualityRanking(num_levels=2, taus=(), top_t=2**31)
    # a tiny run ends before the paper's 0.8 epoch would
    warmup_epochs = 0.15 if size == "tiny" else 0.8
    return TokenQualityRanking(delta=9.0 if size in ("base", "large") else 3.0, warmup_epochs=warmup_epochs)
