"""Reading a DeepSpeed configuration: unknown keys, contradictions with flags, and what "auto" stands for."""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peer_scale.configuration import Given, settings
from peer_scale.errors import UserError
from peer_scale.settings.shipped import find_ds_config

AUTO = "auto"
_ACCUMULATION = "gradient_accumulation_steps"

_OPTIMIZER_PARAMS = ("lr", "betas", "eps", "weight_decay", "bias_correction", "torch_adam", "adam_w_mode")
_SCHEDULER_PARAMS = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps", "warmup_type")
_TOP_LEVEL = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "data_types", "communication_data_type"),
    *("prescale_gradients", "gradient_predivide_factor", "zero_allow_untested_optimizer", "dump_state"),
    *("zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger"),
    *("flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet", "aio", "checkpoint", "disable_allgather"),
)
DEFAULT_DS_CONFIG: dict[str, Any] = {"zero_optimization": {"stage": 2}}


def read_ds_config(path: Path | None) -> dict[str, Any]:
    """Give the file's content, or the default; UserError where it is missing, not JSON, or has an unknown key."""
    if path is None:
        return json.loads(json.dumps(DEFAULT_DS_CONFIG))
    path = find_ds_config(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(config).__name__}")
    check_ds_config(config, str(path))
    return config


def check_ds_config(config: dict[str, Any], path: str) -> None:
    """Raise UserError that begins with `path` for unknown keys, and for values that cannot be right."""
    _known(config, _TOP_LEVEL, path, "")
    for section, model in _deepspeed_models().items():
        fields = [name for key, field in model.model_fields.items() for name in (key, field.alias) if name]
        _known(_section(config, section, path), fields, path, section)
    for section, known in (("optimizer", _OPTIMIZER_PARAMS), ("scheduler", _SCHEDULER_PARAMS)):
        block = _section(config, section, path)
        _known(block, ("type", "params"), path, section)
        _known(_section(block, "params", path), known, path, f"{section}.params")
    _check_type(config, "optimizer", ("Adam", "AdamW"), path)
    _check_type(config, "scheduler", ("WarmupDecayLR",), path)
    betas = _section(config.get("optimizer", {}), "params", path).get("betas", AUTO)
    if betas != AUTO and not (isinstance(betas, list) and len(betas) == 2):
        raise UserError(f"{path}: optimizer.params.betas is {betas!r}; it must be a list of two numbers")
    stage = _section(config, "zero_optimization", path).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}; it must be 1, 2 or 3")


def _deepspeed_models() -> dict[str, Any]:
    """DeepSpeed's own descriptions of its blocks: which keys there are, of which type."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}


def _check_values(config: dict[str, Any]) -> None:
    for section, model in _deepspeed_models().items():
        try:
            model(**config.get(section, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([section, *map(str, first["loc"])])
            raise UserError(f"the ds_config's {key} is {first['input']!r}: {first['msg']}") from None


def _section(config: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    block = config.get(key, {})
    if not isinstance(block, dict):
        raise UserError(f"{path}: {key} must be a JSON object, not {block!r}")
    return block


def _known(block: dict[str, Any], known: Iterable[str], path: str, where: str) -> None:
    names = list(known)
    for key in block:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)
            full = f"{where}.{key}" if where else key
            raise UserError(f"{path}: unknown key {full}; did you mean {near[0]}?")


def _check_type(config: dict[str, Any], section: str, known: tuple[str, ...], path: str) -> None:
    kind = config.get(section, {}).get("type", known[0])
    if kind not in known:
        raise UserError(f"{path}: {section}.type is {kind!r}; it must be {' or '.join(known)}")


def look_up(config: dict[str, Any], dotted: str) -> Any:
    """Give the value at a dotted key, a number being a place in a list; None where it is absent or "auto"."""
    value: Any = config
    for part in dotted.split("."):
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)]
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return None if value == AUTO else value


def given_by(config: dict[str, Any], cls: type, others: Mapping[str, Given]) -> dict[str, Given]:
    """Find the values of a configuration's fields that the ds_config gives, by the fields' names.

    Raises:
        UserError: a value is out of its bounds, or differs from the one in `others` or at another key; both are named.
    """
    found: dict[str, Given] = {}
    for name, setting in settings(cls).items():
        for dotted in setting.option.ds_config:
            value, source = look_up(config, dotted), f"the ds_config's {dotted}"
            if value is None:
                continue
            here = Given(setting.checked(value, source), source)
            for other in (found.get(name), others.get(name)):
                if other is not None and other.value != here.value:
                    raise UserError(
                        f"{other.source} {other.value} contradicts {source} {value}: "
                        'give one of them, or "auto" in the ds_config'
                    )
            found[name] = here
    return found


def precision_of(config: dict[str, Any]) -> str | None:
    """Give what the fp16 and bf16 blocks ask for; None where they leave it open."""
    fp16, bf16 = look_up(config, "fp16.enabled"), look_up(config, "bf16.enabled")
    if fp16 and bf16:
        raise UserError("the ds_config enables both fp16.enabled and bf16.enabled: choose one")
    if fp16 or bf16:
        return "fp16" if fp16 else "bf16"
    said_no = [block for block, value in (("fp16", fp16), ("bf16", bf16)) if value is False]
    left_open = [block for block in ("fp16", "bf16") if look_up(config, f"{block}.enabled") is None and block in config]
    return "fp32" if said_no and not left_open else None


def resolved_ds_config(
    config: dict[str, Any], training: Any, *, num_micro_batches: int, hidden_size: int
) -> dict[str, Any]:
    """Make what DeepSpeed gets: with the values of `training` filled in and every "auto" replaced.

    Optimizer and schedule are left out: they are built here.
    """
    resolved = json.loads(json.dumps({k: v for k, v in config.items() if k not in ("optimizer", "scheduler")}))
    for block in ("fp16", "bf16"):
        resolved.setdefault(block, {})["enabled"] = training.precision == block
    if training.precision == "bf16":
        resolved.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    resolved |= {key: getattr(training, name) for name, key in _filled_in(type(training))}
    resolved[_ACCUMULATION] = num_micro_batches
    sizes = {
        "reduce_bucket_size": max(hidden_size * hidden_size, 1 << 20),
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = resolved["zero_optimization"]
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == AUTO})
    resolved.setdefault("steps_per_print", 2**62)
    resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_force_ds_cpu_optimizer"] = False
    _no_auto_left(resolved, "")
    _check_values(resolved)
    return resolved


def with_autos(resolved: dict[str, Any], training: type) -> dict[str, Any]:
    """Undo `resolved_ds_config` where it filled values in, so that they stand in one place of a run.yaml."""
    config = json.loads(json.dumps(resolved))
    for block in ("fp16", "bf16"):
        config[block]["enabled"] = AUTO
    return config | dict.fromkeys((_ACCUMULATION, *(key for _, key in _filled_in(training))), AUTO)


def _filled_in(cls: type) -> list[tuple[str, str]]:
    """Fields of `TrainingConfig` that DeepSpeed is told, and the ds_config's keys for them."""
    pairs = ((name, key) for name, setting in settings(cls).items() for key in setting.option.ds_config)
    return [(name, key) for name, key in pairs if key in _TOP_LEVEL]


def _no_auto_left(block: dict[str, Any], where: str) -> None:
    for key, value in block.items():
        if value == AUTO:
            raise UserError(f'the ds_config\'s {where}{key} is "auto", which has no meaning there: give a value')
        if isinstance(value, dict):
            _no_auto_left(value, f"{where}{key}.")
