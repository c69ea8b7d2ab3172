"""Settings of runs too small to be trained, for what needs to know a run."""

from dataclasses import replace
from typing import Any

from peer_scale.settings.presets import find_preset
from peer_scale.settings.run import DataConfig, OutputConfig, RunConfig

GLOBAL_BATCH = 6


def small_run(preset: str = "peer-tiny", *, output: OutputConfig | None = None, **training: Any) -> RunConfig:
    """The preset with 20 steps of 6 sequences of 32 tokens, and what `training` changes."""
    found = find_preset(preset)
    sizes = {"train_iters": 20, "seq_length": 32, "micro_batch_size": 3, "global_batch_size": GLOBAL_BATCH}
    return RunConfig(
        name=preset,
        model=found.model,
        objective=found.objective,
        masking=found.masking,
        training=replace(found.training, **(sizes | training)),
        data=DataConfig(),
        output=output or OutputConfig(),
        deepspeed={"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}},
    )
