"""Reads an experiment's YAML file, by the fields of its configurations."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_scale.configuration import settings, shown
from peer_scale.errors import UserError
from peer_scale.experiments.config import ExperimentConfig, TaskConfig
from peer_scale.experiments.measures import measures
from peer_scale.settings import yaml_text
from peer_scale.settings.names import hint


def read_experiment(path: Path) -> ExperimentConfig:
    """Read a YAML file; UserError with one line that names the key where something is wrong."""
    try:
        content = yaml_text.load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    config = _build(ExperimentConfig, content, f"{path}", "")
    names = [measure.name for measure in measures(config)]
    if config.primary is not None and config.primary not in names:
        raise UserError(f"{path}: primary: no measure {config.primary}{hint(config.primary, names)}")
    return config


def _build(cls: type, content: Any, path: str, where: str) -> Any:
    """Make a configuration of a mapping; a list makes a tuple of them, and a text in it one with that name."""
    source = f"{path}: {where}" if where else path
    if not isinstance(content, Mapping):
        raise UserError(f"{source} must be a mapping, not {shown(content)}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    made: dict[str, Any] = {}
    for key, value in content.items():
        at = f"{where}.{key}" if where else str(key)
        if key not in names:
            raise UserError(f"{path}: unknown key {at}{hint(key, names)}")
        if key in settings(cls):
            made[key] = settings(cls)[key].checked(value, f"{path}: {at}")
        elif value is not None:
            made[key] = _nested(hints[key], value, path, at)
    missing = [name for name, setting in settings(cls).items() if setting.is_required and name not in made]
    if missing:
        raise UserError(f"{source}{' ' if where else ': '}needs {', '.join(missing)}")
    try:
        return cls(**made)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _nested(annotation: Any, value: Any, path: str, where: str) -> Any:
    inner = next(each for each in typing.get_args(annotation) if dataclasses.is_dataclass(each))
    if typing.get_origin(annotation) is not tuple:
        return _build(inner, value, path, where)  # type: ignore[arg-type]
    if not isinstance(value, list):
        raise UserError(f"{path}: {where} must be a list, not {shown(value)}")
    entries = [{"name": each} if isinstance(each, str) and inner is TaskConfig else each for each in value]
    return tuple(_build(inner, each, path, f"{where}[{index}]") for index, each in enumerate(entries))  # type: ignore
