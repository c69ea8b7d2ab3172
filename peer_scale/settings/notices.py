"""What a run does otherwise than its settings might make a user think: a line each, printed when it starts."""

from collections.abc import Mapping
from typing import Any

from peer_scale.settings.ds_config import NEVER
from peer_scale.settings.ds_keys import AUTO
from peer_scale.settings.run import OutputConfig, RunConfig, TrainingConfig


def notices(run: RunConfig, ds_config: Mapping[str, Any]) -> list[str]:
    """List the lines, for the first rank to print; `ds_config` is the one that was given."""
    return [*_of_output(run.output), *_of_training(run.training), *_of_deepspeed(ds_config)]


def _of_output(output: OutputConfig) -> list[str]:
    lines = []
    if output.save is None:
        if output.exit_duration_in_mins is not None:
            lines.append("--exit-duration-in-mins ends the run without saving it: --save is not given")
        if output.keep_last != OutputConfig.keep_last:
            lines.append(f"--keep-last {output.keep_last} has no effect: --save is not given")
    if output.eval_interval is None and output.eval_iters != OutputConfig.eval_iters:
        lines.append(f"--eval-iters {output.eval_iters} has no effect: --eval-interval is not given")
    return lines


def _of_training(training: TrainingConfig) -> list[str]:
    if training.lr_warmup_iters > training.train_iters:
        return [
            f"the learning rate never reaches {training.lr:g}: its warm-up takes {training.lr_warmup_iters:,} steps "
            f"(--lr-warmup-iters), the run {training.train_iters:,}"
        ]
    return []


def _of_deepspeed(config: Mapping[str, Any]) -> list[str]:
    lines = []
    scheduler = config.get("scheduler", {})
    if scheduler and "warmup_type" not in scheduler.get("params", {}):
        lines.append(
            "the ds_config's scheduler leaves warmup_type open, where DeepSpeed would take log: the warm-up is linear"
        )
    if config.get("steps_per_print", AUTO) not in (AUTO, NEVER):
        lines.append(
            "the ds_config's steps_per_print is for DeepSpeed's own lines, which --verbose shows; "
            "--log-interval is for those here"
        )
    if config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save") is True:
        lines.append(
            "the ds_config's stage3_gather_16bit_weights_on_model_save has no effect: "
            "peer-scale convert to-hf makes one file of any checkpoint"
        )
    return lines
