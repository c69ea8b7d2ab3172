"""YAML files with settings: `--config` reads them, and every run with a log folder writes one, its run.yaml."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from peer_scale.configuration import Given, settings, shown, values
from peer_scale.errors import UserError
from peer_scale.objectives.objective import Objective
from peer_scale.objectives.registry import objective_class
from peer_scale.samples.masking import MaskingConfig
from peer_scale.settings import yaml_text
from peer_scale.settings.ds_config import with_autos
from peer_scale.settings.ds_keys import checked_ds_config
from peer_scale.settings.names import hint
from peer_scale.settings.run import RunConfig, TrainingConfig

_HEADER = "# The whole run as it was resolved. --config with this file repeats it; flags win over what stands here.\n"
T = TypeVar("T")


@dataclass(frozen=True)
class ConfigFile:
    """Settings by the names of `RunConfig`'s fields; empty where no file was given."""

    path: Path | None = None
    content: Mapping[str, Any] = field(default_factory=dict)

    def given(self, cls: type, section: str) -> dict[str, Given]:
        """Find the values of a flat configuration's fields in `section`; UserError for unknown keys and bad values."""
        return self._given(cls, self._section(section), f"{section}.", settings(cls))

    def given_to_run(self) -> dict[str, Given]:
        """Find the values that stand outside of all sections."""
        names = settings(RunConfig)
        content = {name: value for name, value in self.content.items() if name in names and name != "deepspeed"}
        return self._given(RunConfig, content, "", names)

    def changed(self, config: T, section: str) -> T:
        """Give `config` with what the file says of it in `section`, configurations within it included."""
        return self._changed(config, self._section(section), section)

    def objective(self, preset: Objective) -> Objective:
        """Give the preset's objective, or the one that the file names, with its defaults, where that is another."""
        kind = self._section("objective").get("kind", preset.kind)
        if not isinstance(kind, str):
            raise UserError(f"{self.path}: objective.kind is {shown(kind)}; it must be text")
        try:
            return preset if kind == preset.kind else objective_class(kind)()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None

    def given_to_objective(self, objective: Objective) -> dict[str, Given]:
        """Find the values of an objective's fields."""
        content = {key: value for key, value in self._section("objective").items() if key != "kind"}
        return self._given(type(objective), content, "objective.", settings(type(objective)))

    @property
    def ds_config(self) -> dict[str, Any] | None:
        """The section `deepspeed`, with its keys checked."""
        if "deepspeed" not in self.content:
            return None
        return checked_ds_config(self._section("deepspeed"), f"{self.path}: deepspeed")

    def _section(self, name: str) -> Mapping[str, Any]:
        return self._mapping(self.content.get(name, {}), name)

    def _mapping(self, value: Any, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise UserError(f"{self.path}: {where} must be a mapping, not {shown(value)}")
        return value

    def _given(self, cls: type, content: Mapping[str, Any], where: str, known: Iterable[str]) -> dict[str, Given]:
        found = {}
        for key, value in content.items():
            _require_known(key, known, f"{self.path}: unknown key {where}{key}")
            source = f"{self.path}: {where}{key}"
            found[key] = Given(settings(cls)[key].checked(value, source), source)
        return found

    def _changed(self, config: Any, content: Mapping[str, Any], where: str) -> Any:
        cls: type = type(config)
        nested = [each.name for each in dataclasses.fields(cls) if each.name not in settings(cls)]
        flat = {key: value for key, value in content.items() if key not in nested}
        changes = values(self._given(cls, flat, f"{where}.", [*settings(cls), *nested]))
        for key in content.keys() - flat.keys():
            changes[key] = self._nested(config, key, content[key], f"{where}.{key}")
        return replace(config, **changes)

    def _nested(self, config: Any, key: str, value: Any, where: str) -> Any:
        """Change a configuration within another, or make it where there is none; null takes an optional one away."""
        hint = typing.get_type_hints(type(config))[key]
        types = typing.get_args(hint) or (hint,)
        if value is None and type(None) in types:
            return None
        current, content = getattr(config, key), self._mapping(value, where)
        if current is not None:
            return self._changed(current, content, where)
        cls = next(each for each in types if each is not type(None))
        missing = [name for name, setting in settings(cls).items() if setting.is_required and name not in content]
        if missing:
            raise UserError(f"{self.path}: {where} needs {', '.join(missing)}")
        return cls(**values(self._given(cls, content, f"{where}.", settings(cls))))


def read_config_file(path: Path | None) -> ConfigFile:
    """Read a YAML file; UserError where it cannot be read, or a section is not known."""
    if path is None:
        return ConfigFile()
    try:
        content = yaml_text.load(path.read_text(encoding="utf-8-sig"))
        json.dumps(content, default=str, skipkeys=True)  # nothing that contains itself
    except (OSError, ValueError) as error:
        raise UserError(f"--config {path}: cannot be read as YAML: {error}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping, not {shown(content)}")
    names = [each.name for each in dataclasses.fields(RunConfig)]
    for key in content:
        _require_known(key, names, f"{path}: unknown key {key}")
    return ConfigFile(path, _with_masking_apart(content, path))


def run_yaml(run: RunConfig, comment: str = "") -> str:
    """Write the whole run so that `read_config_file` gives the same one; `comment` is lines that begin with #."""
    content = dataclasses.asdict(run)
    content["objective"] = run.objective.section()
    content["deepspeed"] = with_autos(run.deepspeed, TrainingConfig)
    return _HEADER + comment + yaml_text.dump(json.loads(json.dumps(content, default=str)))


def _require_known(key: Any, known: Iterable[str], complaint: str) -> None:
    names = list(known)
    if key not in names:
        raise UserError(f"{complaint}{hint(key, names)}")


def _with_masking_apart(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Accept masking within the section `objective`, where it stood in older files."""
    objective = content.get("objective")
    if not isinstance(objective, dict):
        return content
    masking = {key: objective[key] for key in settings(MaskingConfig) if key in objective}
    if not masking:
        return content
    both = [key for key in masking if isinstance(content.get("masking"), dict) and key in content["masking"]]
    if both:
        raise UserError(f"{path}: {both[0]} stands twice, as objective.{both[0]} and as masking.{both[0]}")
    rest = {key: value for key, value in objective.items() if key not in masking}
    section = content.get("masking", {})
    merged = {**masking, **section} if isinstance(section, dict) else section
    return {**content, "objective": rest, "masking": merged}
