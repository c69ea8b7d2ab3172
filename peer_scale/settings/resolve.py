"""From flags, YAML file, ds_config and preset to one RunConfig: a flag beats the file, the file beats the preset."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.objective import Objective
from peer_scale.settings.ds_config import (
    look_up,
    precision_of,
    read_ds_config,
    reconcile,
    resolved_ds_config,
)
from peer_scale.settings.presets import Preset, find_preset
from peer_scale.settings.run import DataConfig, OutputConfig, RunConfig, TrainingConfig

_SHAPE_FIELDS = tuple(field.name for field in dataclasses.fields(EncoderShape))
T = TypeVar("T")


def resolve(args: argparse.Namespace, data_parallel: int, environ: Mapping[str, str] = os.environ) -> RunConfig:
    """The whole run, checked; raises UserError for whatever does not hold together."""
    ds_config = read_ds_config(args.deepspeed_config)
    preset = resolve_model(args)
    flags = _given(args)
    training = _training(preset.training, flags, ds_config, data_parallel)
    return RunConfig(
        name=args.model,
        model=preset.model,
        objective=preset.objective,
        masking=preset.masking,
        training=training,
        data=_data(flags, environ),
        output=_override(OutputConfig(), flags),
        deepspeed=_deepspeed(ds_config, training, preset.model, data_parallel),
        seed=args.seed,
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
    )


def resolve_model(args: argparse.Namespace) -> Preset:
    """The preset with what the file and the flags change of its model and objective; `training` as the file has it."""
    preset = with_yaml(find_preset(args.model), args.config)
    flags = _given(args)
    return replace(
        preset,
        model=_model(preset.model, flags),
        objective=_changed_objective(preset.objective, flags),
        masking=_override(preset.masking, flags),
    )


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if value is not None}


def _override(config: T, values: Mapping[str, Any]) -> T:
    """`config` with the fields that `values` names; lists become tuples."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in names}
    return replace(config, **chosen)  # type: ignore[type-var]


def with_yaml(preset: Preset, path: Path | None) -> Preset:
    """The preset with what the file changes of its model, objective and training; UserError for what is not known."""
    if path is None:
        return preset
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    return _nested(preset, content, str(path))


def _nested(config: T, values: Any, where: str) -> T:
    """`config` with a mapping's values put in its place, field by field, into nested dataclasses too."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be a mapping, not {values!r}")
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    changes = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}; known: {', '.join(fields)}")
        current = getattr(config, key)
        if dataclasses.is_dataclass(current):
            changes[key] = _nested(current, value, f"{where}: {key}")
        else:
            changes[key] = _typed(current, value, f"{where}: {key}")
    return replace(config, **changes)  # type: ignore[type-var]


def _typed(current: Any, value: Any, where: str) -> Any:
    """A YAML value in the type the preset has there (YAML reads 1e-3 as text)."""
    try:
        if isinstance(current, tuple):
            return tuple(float(item) for item in value)
        if isinstance(current, bool) or current is None:
            assert isinstance(value, type(current))
            return value
        converted = type(current)(value)
        assert not isinstance(current, int) or converted == float(value)
    except (TypeError, ValueError, AssertionError):
        raise UserError(f"{where} is {value!r}; it must be like {current!r}") from None
    return converted


def _changed_objective(objective: Objective, flags: Mapping[str, Any]) -> Objective:
    names = {field.name for field in dataclasses.fields(objective)}  # type: ignore[arg-type]
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in flags.items() if key in names}
    return objective.changed(changes)


def _model(model: ModelConfig, flags: Mapping[str, Any]) -> ModelConfig:
    main = {key: flags[key] for key in _SHAPE_FIELDS if key in flags}
    prefix = "generator_"
    narrow = {key: flags[prefix + key] for key in _SHAPE_FIELDS if prefix + key in flags}
    if model.ranker is None:
        changed: dict[str, Any] = {"generator": replace(model.generator, **{**main, **narrow})}
    else:
        shared_sizes = (
            {key: value for key, value in main.items() if key != "num_layers"} if model.num_shared_layers else {}
        )
        changed = {
            "ranker": replace(model.ranker, **main),
            "generator": replace(model.generator, **{**shared_sizes, **narrow}),
        }
    if "hidden_size" in main and model.embedding_size == model.main_network.hidden_size:
        changed["embedding_size"] = main["hidden_size"]
    return _override(replace(model, **changed), flags)


def _training(
    training: TrainingConfig, flags: Mapping[str, Any], ds_config: dict[str, Any], data_parallel: int
) -> TrainingConfig:
    flags = dict(flags)
    warmup = look_up(ds_config, "scheduler.params.warmup_num_steps")
    if "train_iters" in flags and "lr_warmup_iters" not in flags and warmup is None:
        # a run cut short by hand warms up in the same share of its steps
        share = training.lr_warmup_iters / training.train_iters
        flags["lr_warmup_iters"] = min(training.lr_warmup_iters, round(share * flags["train_iters"]))
    for dotted, name in (
        ("optimizer.params.lr", "lr"),
        ("scheduler.params.warmup_max_lr", "lr"),
        ("optimizer.params.eps", "adam_eps"),
        ("optimizer.params.weight_decay", "weight_decay"),
        ("optimizer.params.bias_correction", "adam_bias_correction"),
        ("scheduler.params.warmup_num_steps", "lr_warmup_iters"),
        ("scheduler.params.total_num_steps", "train_iters"),
        ("gradient_clipping", "clip_grad"),
    ):
        value = reconcile(ds_config, dotted, f"--{name.replace('_', '-')}", flags.get(name))
        if value is not None:
            flags[name] = value
    betas = look_up(ds_config, "optimizer.params.betas")
    for index, name in enumerate(("adam_beta1", "adam_beta2")):
        if betas is not None:
            flags[name] = reconcile({"beta": betas[index]}, "beta", f"--{name.replace('_', '-')}", flags.get(name))
    if look_up(ds_config, "scheduler.params.warmup_min_lr"):
        raise UserError("the ds_config's scheduler.params.warmup_min_lr must be 0: the warm-up starts there")
    flags["precision"] = _precision(training, flags, ds_config)
    flags |= _batch_sizes(training, flags, ds_config, data_parallel)
    return _override(training, flags)


def _precision(training: TrainingConfig, flags: Mapping[str, Any], ds_config: dict[str, Any]) -> str:
    asked, flag = precision_of(ds_config), flags.get("precision")
    if asked is not None and flag is not None and asked != flag:
        raise UserError(f"--{flag} contradicts the ds_config's fp16/bf16 blocks, which ask for {asked}")
    return asked or flag or training.precision


def _batch_sizes(
    training: TrainingConfig, flags: Mapping[str, Any], ds_config: dict[str, Any], data_parallel: int
) -> dict[str, int]:
    """Global and micro batch such that global = micro x data-parallel size x gradient accumulation steps."""
    total = reconcile(ds_config, "train_batch_size", "--global-batch-size", flags.get("global_batch_size"))
    micro = reconcile(ds_config, "train_micro_batch_size_per_gpu", "--micro-batch-size", flags.get("micro_batch_size"))
    steps = look_up(ds_config, "gradient_accumulation_steps")
    for name, value in (("global batch", total), ("micro-batch", micro), ("gradient_accumulation_steps", steps)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{name} size is {value!r}; it must be a whole number from 1")
    if total is None:
        total = training.global_batch_size if micro is None or steps is None else micro * steps * data_parallel
    if micro is None:
        share = total // ((steps or 1) * data_parallel)
        micro = share if steps else _largest_divisor(share, training.micro_batch_size)
    if total < 1 or micro < 1 or total % (micro * data_parallel) or (steps and total != micro * steps * data_parallel):
        accumulation = f" x {steps} gradient accumulation steps" if steps else ""
        raise UserError(
            f"global batch size {total} is not a multiple of micro-batch size {micro} x data-parallel size "
            f"{data_parallel}{accumulation}: change --global-batch-size or --micro-batch-size"
        )
    return {"global_batch_size": total, "micro_batch_size": micro}


def _largest_divisor(number: int, limit: int) -> int:
    return next((d for d in range(min(number, limit), 0, -1) if number % d == 0), 1)


def _data(flags: Mapping[str, Any], environ: Mapping[str, str]) -> DataConfig:
    default = DataConfig()
    if "XDG_CACHE_HOME" in environ:
        default = replace(default, cache_dir=Path(environ["XDG_CACHE_HOME"]) / "peer_scale")
    return _override(default, flags)


def _deepspeed(
    ds_config: dict[str, Any], training: TrainingConfig, model: ModelConfig, data_parallel: int
) -> dict[str, Any]:
    values = {
        "precision": training.precision,
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * data_parallel),
        "gradient_clipping": training.clip_grad,
    }
    hidden_size = model.main_network.hidden_size
    return resolved_ds_config(ds_config, values, hidden_size=hidden_size)
