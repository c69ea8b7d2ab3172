"""Reading a DeepSpeed configuration: contradictions with flags, what "auto" stands for, and what DeepSpeed gets."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_scale.configuration import Given, settings
from peer_scale.errors import UserError
from peer_scale.parallel.buckets import bucket_sizes
from peer_scale.settings.ds_keys import AUTO, SCALARS, checked_ds_config
from peer_scale.settings.ds_start import check_start
from peer_scale.settings.shipped import find_ds_config

_ACCUMULATION = "gradient_accumulation_steps"
_GRAD_ACCUM_DTYPE = "grad_accum_dtype"
NEVER = 2**62
"""Steps between DeepSpeed's own lines, where the ds_config does not ask for them."""
DEFAULT_DS_CONFIG: dict[str, Any] = {"zero_optimization": {"stage": 2, "reduce_bucket_size": AUTO}}
_BY_PARAMETERS = ("reduce_bucket_size", "stage3_prefetch_bucket_size")
"""Of `zero_optimization`: sizes that follow from the model's, which is known when the model is built."""


def read_ds_config(path: Path | None) -> dict[str, Any]:
    """Give the file's content, or the default, as `checked_ds_config` does.

    What DeepSpeed reads is read: JSON with comments, trailing commas or a byte order mark, and the base64 text of one
    in place of a path.

    Raises:
        UserError: the file is missing or cannot be read, has a key twice or one that is not known, or a value that
            cannot be right.
    """
    if path is None:
        return json.loads(json.dumps(DEFAULT_DS_CONFIG))
    decoded = _from_base64(str(path))
    if decoded is not None:
        return checked_ds_config(_parsed(decoded, "--deepspeed_config (base64)"), "--deepspeed_config (base64)")
    try:
        path = find_ds_config(path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--deepspeed_config {path}: cannot be read: {error}") from None
    return checked_ds_config(_parsed(text, str(path)), str(path))


def _from_base64(given: str) -> str | None:
    """Decode what DeepSpeed takes in place of a path; None where it is a path."""
    try:
        text = base64.b64decode(given, altchars=b"-_", validate=True).decode("utf-8")
    except ValueError:
        return None
    return text if text.lstrip().startswith("{") else None


def _parsed(text: str, path: str) -> dict[str, Any]:
    import hjson

    try:
        config = hjson.loads(text, object_pairs_hook=_without_repetition)
    except hjson.HjsonDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that DeepSpeed reads: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold a JSON object, not {type(config).__name__}")
    return config


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; ValueError where it has a key twice, as DeepSpeed raises."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice} stands twice in one object")
    return content


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
            here = Given(setting.checked(value, source, typed=True), source)
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

    But for the sizes of ZeRO's buckets, for which `with_bucket_sizes` needs the model. Optimizer and schedule are left
    out: they are built here.
    """
    resolved = json.loads(json.dumps({k: v for k, v in config.items() if k not in ("optimizer", "scheduler")}))
    for block in ("fp16", "bf16"):
        resolved.setdefault(block, {})["enabled"] = training.precision == block
    data_types = resolved.get("data_types", {})
    if data_types.get(_GRAD_ACCUM_DTYPE, AUTO) == AUTO:
        data_types.pop(_GRAD_ACCUM_DTYPE, None)
        if training.precision == "bf16":
            resolved["data_types"] = {**data_types, _GRAD_ACCUM_DTYPE: "fp32"}
    resolved |= {key: getattr(training, name) for name, key in _filled_in(type(training))}
    resolved[_ACCUMULATION] = num_micro_batches
    zero = resolved["zero_optimization"]
    if zero.get("stage3_param_persistence_threshold") == AUTO:
        zero["stage3_param_persistence_threshold"] = 10 * hidden_size
    if resolved.get("steps_per_print", AUTO) == AUTO:
        resolved["steps_per_print"] = NEVER
    resolved["zero_force_ds_cpu_optimizer"] = False
    complete = with_bucket_sizes(resolved, num_parameters=1, data_parallel=1, on_gpu=False)
    _no_auto_left(complete, "")
    check_start(complete, training.precision)
    return resolved


def with_bucket_sizes(
    resolved: Mapping[str, Any], *, num_parameters: int, data_parallel: int, on_gpu: bool
) -> dict[str, Any]:
    """Replace the last "auto" of what DeepSpeed gets, for a rank with so many parameters."""
    buckets = bucket_sizes(num_parameters, data_parallel, on_gpu=on_gpu)
    sizes = dict(zip(_BY_PARAMETERS, (buckets.reduce, buckets.prefetch), strict=True))
    zero = resolved["zero_optimization"]
    chosen = {key: size for key, size in sizes.items() if zero.get(key) == AUTO}
    return {**resolved, "zero_optimization": {**zero, **chosen}}


def with_autos(resolved: dict[str, Any], training: type) -> dict[str, Any]:
    """Undo `resolved_ds_config` where it filled values in, so that they stand in one place of a run.yaml."""
    config = json.loads(json.dumps(resolved))
    for block in ("fp16", "bf16"):
        config[block]["enabled"] = AUTO
    if resolved["bf16"]["enabled"] and config["data_types"][_GRAD_ACCUM_DTYPE] == "fp32":
        config["data_types"][_GRAD_ACCUM_DTYPE] = AUTO
    if config["steps_per_print"] == NEVER:
        config["steps_per_print"] = AUTO
    return config | dict.fromkeys((_ACCUMULATION, *(key for _, key in _filled_in(training))), AUTO)


def _filled_in(cls: type) -> list[tuple[str, str]]:
    """Give the fields of `TrainingConfig` that DeepSpeed is told, each with the ds_config's key for it."""
    pairs = ((name, key) for name, setting in settings(cls).items() for key in setting.option.ds_config)
    return [(name, key) for name, key in pairs if key in SCALARS]


def _no_auto_left(block: dict[str, Any], where: str) -> None:
    for key, value in block.items():
        if value == AUTO:
            raise UserError(f'the ds_config\'s {where}{key} is "auto", which has no meaning there: give a value')
        if isinstance(value, dict):
            _no_auto_left(value, f"{where}{key}.")
