"""From flags, YAML file, ds_config and preset to one RunConfig.

A flag beats the file, the file beats the preset. The ds_config is as binding as a flag: where it gives a value that a
flag or the file gives too, the two must be equal.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from peer_scale.configuration import Given, settings, values
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.parallel.topology import check_parallel_sizes
from peer_scale.samples.masking import MaskingConfig
from peer_scale.settings.config_file import ConfigFile, read_config_file
from peer_scale.settings.ds_config import given_by, look_up, precision_of, read_ds_config, resolved_ds_config
from peer_scale.settings.flags import GENERATOR, given, given_to_objective
from peer_scale.settings.notices import notices
from peer_scale.settings.presets import FIRST_RUN, Preset, find_preset, first_run
from peer_scale.settings.run import DataConfig, OutputConfig, RunConfig, TrainingConfig

T = TypeVar("T")


def resolve(
    args: argparse.Namespace,
    world_size: int,
    environ: Mapping[str, str] = os.environ,
    notify: Callable[[str], None] | None = None,
) -> RunConfig:
    """Put together the whole run of `world_size` ranks, checked; UserError for whatever does not hold together.

    `notify` gets a line for each thing that the run does otherwise than its settings might make a user think.
    """
    file = read_config_file(args.config)
    outside = values({**file.given_to_run(), **given(args, RunConfig)})
    sizes = (outside.get(name, settings(RunConfig)[name].default) for name in ("tensor_parallel", "pipeline_parallel"))
    data_parallel = check_parallel_sizes(world_size, *sizes)
    preset = _preset(args, file)
    ds_config = file.ds_config if args.deepspeed_config is None else None
    if ds_config is None:
        ds_config = read_ds_config(args.deepspeed_config)
    _require_verbose(args, ds_config)
    training = _training(preset.training, file, given(args, TrainingConfig), ds_config, data_parallel)
    run = RunConfig(
        **outside,
        model=preset.model,
        objective=preset.objective,
        masking=preset.masking,
        training=training,
        data=_flat(default_data(environ), "data", args, file),
        output=_flat(OutputConfig(), "output", args, file),
        deepspeed=resolved_ds_config(
            ds_config,
            training,
            num_micro_batches=training.global_batch_size // (training.micro_batch_size * data_parallel),
            hidden_size=preset.model.main_network.hidden_size,
        ),
    )
    if notify is not None:
        if _named(args, file) is None:
            notify(
                f"no --model is named: {FIRST_RUN} as it learns within minutes; --model {FIRST_RUN} has BERT's blocks"
            )
        for line in notices(run, ds_config):
            notify(line)
    return run


def _require_verbose(args: argparse.Namespace, ds_config: Mapping[str, Any]) -> None:
    """Raise UserError for what DeepSpeed would print into its log, where nobody would see it."""
    asked = [key for key in ("wall_clock_breakdown", "memory_breakdown", "dump_state") if ds_config.get(key)]
    if asked and not args.verbose:
        raise UserError(f"the ds_config's {asked[0]} goes into DeepSpeed's log, which only --verbose lets through")


def resolve_model(args: argparse.Namespace) -> Preset:
    """Give the preset with what file and flags change of its model, objective and masking, and the file of the rest."""
    return _preset(args, read_config_file(args.config))


def with_yaml(preset: Preset, path: Path | None) -> Preset:
    """Give the preset with what the file changes of it; UserError for what is not known."""
    return _changed_by_file(preset, read_config_file(path))


def _changed_by_file(preset: Preset, file: ConfigFile) -> Preset:
    objective = file.objective(preset.objective)
    return Preset(
        file.changed(preset.model, "model"),
        objective.changed(values(file.given_to_objective(objective))),
        file.changed(preset.masking, "masking"),
        file.changed(preset.training, "training"),
    )


def _preset(args: argparse.Namespace, file: ConfigFile) -> Preset:
    name = _named(args, file)
    preset = _changed_by_file(first_run() if name is None else find_preset(name), file)
    return replace(
        preset,
        model=_model(preset.model, args),
        objective=preset.objective.changed(values(given_to_objective(args, preset.objective, name or FIRST_RUN))),
        masking=replace(preset.masking, **values(given(args, MaskingConfig))),
    )


def _named(args: argparse.Namespace, file: ConfigFile) -> str | None:
    name = {**file.given_to_run(), **given(args, RunConfig)}.get("name")
    return None if name is None else name.value


def _flat(config: T, section: str, args: argparse.Namespace, file: ConfigFile) -> T:
    """Give a configuration of plain values as the file's section and the flags change it together."""
    changes = {**file.given(type(config), section), **given(args, type(config))}
    return replace(config, **values(changes))  # type: ignore[type-var]


def _model(model: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """Change the networks' sizes; what they share follows the main network unless it is given too."""
    main, generator = values(given(args, EncoderShape)), values(given(args, EncoderShape, GENERATOR))
    *others, trained = model.networks  # the last to run is the one that is trained to be used
    followed = {name: value for name, value in main.items() if name != "num_layers" and model.num_shared_layers}
    changes: dict[str, dict[str, Any]] = {name: dict(followed) for name in others} | {trained: main}
    changes["generator"] = {**changes["generator"], **generator}
    changed: dict[str, Any] = {name: replace(shape, **changes[name]) for name, shape in model.networks.items()}
    if "hidden_size" in main and model.embedding_size == model.main_network.hidden_size:
        changed["embedding_size"] = main["hidden_size"]
    return replace(model, **{**changed, **values(given(args, ModelConfig))})


def _training(
    training: TrainingConfig,
    file: ConfigFile,
    flags: dict[str, Given],
    ds_config: dict[str, Any],
    data_parallel: int,
) -> TrainingConfig:
    """Put flags and ds_config over `training`, which is the preset's with the file's changes."""
    in_file = file.given(TrainingConfig, "training")
    binding = {**flags, **given_by(ds_config, TrainingConfig, {**in_file, **flags})}
    changes = values(binding)
    changes["micro_batch_tokens"] = _token_budget(in_file, flags, binding, ds_config)
    if "train_iters" in flags and "lr_warmup_iters" not in binding:
        # a run cut short by hand warms up in the same share of its steps
        share = training.lr_warmup_iters / training.train_iters
        changes["lr_warmup_iters"] = min(training.lr_warmup_iters, round(share * flags["train_iters"].value))
    asked, said = precision_of(ds_config), flags.get("precision", in_file.get("precision"))
    if asked is not None:
        if said is not None and said.value != asked:
            raise UserError(f"{said.source} contradicts the ds_config's fp16/bf16 blocks, which ask for {asked}")
        changes["precision"] = asked
    changes |= _batch_sizes(training, changes, ds_config, data_parallel)
    return replace(training, **changes)


def _token_budget(
    in_file: Mapping[str, Given], flags: Mapping[str, Given], binding: Mapping[str, Given], ds_config: dict[str, Any]
) -> int | None:
    """Give the tokens that a micro-batch may have, None where it has so many sequences.

    Raises:
        UserError: the other is given as well, or a number of micro-batches.
    """
    said = flags.get("micro_batch_tokens", in_file.get("micro_batch_tokens"))
    if said is None or said.value is None or ("micro_batch_size" in flags and "micro_batch_tokens" not in flags):
        return None
    others = [f"{other.source} {other.value}" for name, other in binding.items() if name == "micro_batch_size"]
    if (steps := look_up(ds_config, "gradient_accumulation_steps")) is not None:
        others.append(f"the ds_config's gradient_accumulation_steps {steps}")
    if others:
        raise UserError(f"{said.source} {said.value} leaves no room for {others[0]}: give one of them")
    return said.value


def _batch_sizes(
    training: TrainingConfig, given_values: Mapping[str, Any], ds_config: dict[str, Any], data_parallel: int
) -> dict[str, int]:
    """Find global and micro batch such that global = micro x data-parallel size x gradient accumulation steps.

    With a budget of tokens the micro-batch is all that a rank has of a step, the most that it could be.
    """
    total, micro = given_values.get("global_batch_size"), given_values.get("micro_batch_size")
    if given_values["micro_batch_tokens"] is not None:
        total = training.global_batch_size if total is None else total
        if total % data_parallel:
            raise UserError(
                f"global batch size {total} is not a multiple of data-parallel size {data_parallel}: change "
                "--global-batch-size"
            )
        return {"global_batch_size": total, "micro_batch_size": total // data_parallel}
    steps = look_up(ds_config, "gradient_accumulation_steps")
    if total is None:
        total = training.global_batch_size if micro is None or steps is None else micro * steps * data_parallel
    if micro is None:
        share = total // ((steps or 1) * data_parallel)
        micro = share if steps else _largest_divisor(share, training.micro_batch_size)
    if micro < 1 or total % (micro * data_parallel) or (steps and total != micro * steps * data_parallel):
        accumulation = f" x {steps} gradient accumulation steps" if steps else ""
        raise UserError(
            f"global batch size {total} is not a multiple of micro-batch size {micro} x data-parallel size "
            f"{data_parallel}{accumulation}: change --global-batch-size or --micro-batch-size"
        )
    return {"global_batch_size": total, "micro_batch_size": micro}


def _largest_divisor(number: int, limit: int) -> int:
    return next((d for d in range(min(number, limit), 0, -1) if number % d == 0), 1)


def default_data(environ: Mapping[str, str]) -> DataConfig:
    """Give what holds of data where nothing is said."""
    if "XDG_CACHE_HOME" in environ:
        return DataConfig(cache_dir=Path(environ["XDG_CACHE_HOME"]) / "peer_scale")
    return DataConfig()
