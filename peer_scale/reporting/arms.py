"""Runs side by side: which are seeds of one arm, and in what the arms differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peer_scale.reporting.runs import Floats, Run, section

# of Okabe and Ito, told apart by all common kinds of colour vision, and readable on white and on black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_NOT_COMPARED = ("seed", "output", "num_threads", "data.cache_dir", "data.num_workers")
_MOST_KEYS_IN_LABEL = 2
_LONGEST_VALUE = 24


@dataclass(frozen=True)
class Arm:
    """Runs with one configuration, which differ in their seeds; `number` fixes colour and dash pattern."""

    label: str
    number: int
    runs: tuple[Run, ...]

    @property
    def colour(self) -> str:
        """The colour of all that is the arm's."""
        return COLOURS[self.number % len(COLOURS)]

    @property
    def dash(self) -> str:
        """The pattern of the arm's lines, the second cue beside the colour."""
        return DASHES[self.number % len(DASHES)]

    @property
    def counted(self) -> tuple[Run, ...]:
        """The runs that means are taken of: those that reached their last step, or all where none has."""
        return tuple(run for run in self.runs if run.is_whole) or tuple(run for run in self.runs if run.last_step)

    @property
    def num_unfinished(self) -> int:
        """How many runs have not reached their last step."""
        return sum(not run.is_whole for run in self.runs)

    def values(self, name: str) -> Floats:
        """Give the last value of a metric of each counted run that has it."""
        found = (run.last(name) for run in self.counted)
        return np.array([value for value in found if value is not None])


@dataclass(frozen=True)
class Difference:
    """A key of the configuration in which arms differ, with each arm's value as text."""

    key: str
    values: tuple[str, ...]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give a nested configuration as one mapping of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """Put runs that differ in nothing but the seed, and where they write, into one arm each."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        compared = _compared(run)
        key = json.dumps(compared, sort_keys=True, default=str) if compared else f"run {run.name}"
        groups.setdefault(key, []).append(run)
    labels = _labels(list(groups.values()))
    return [
        Arm(label, number, tuple(group))
        for number, (label, group) in enumerate(zip(labels, groups.values(), strict=True))
    ]


def differences(arms: Sequence[Arm]) -> list[Difference]:
    """Give the keys in which the arms' configurations differ; where a run has no configuration it is left out."""
    configs = [_compared(arm.runs[0]) if arm.runs else {} for arm in arms]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        Difference(key, tuple(shown(config[key]) if key in config else "" for config in configs))
        for key in keys
        if len({shown(config.get(key)) if key in config else "" for config in configs if config}) > 1
    ]


def shown(value: Any) -> str:
    """Write a value of a configuration as YAML does."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str)


def _compared(run: Run) -> dict[str, Any]:
    return {
        key: value
        for key, value in flat(run.config).items()
        if not any(key == left_out or key.startswith(f"{left_out}.") for left_out in _NOT_COMPARED)
    }


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Name each arm by its model; where that is not enough, by what differs as well, or by its folder."""
    folders = [group[0].name for group in groups]
    if len(groups) == 1 and len(groups[0]) == 1:
        return folders
    models = [str(group[0].config.get("name") or group[0].name) for group in groups]
    if len(set(models)) == len(models):
        return models
    arms = [Arm("", 0, tuple(group)) for group in groups]
    told = [each for each in differences(arms) if each.key != "name"]
    if 0 < len(told) <= _MOST_KEYS_IN_LABEL and all(len(v) <= _LONGEST_VALUE for each in told for v in each.values):
        labels = [
            " ".join([model, *(f"{each.key.split('.')[-1]} {each.values[i]}" for each in told if each.values[i])])
            for i, model in enumerate(models)
        ]
        if len(set(labels)) == len(labels):
            return labels
    return folders


def arm_of_seed(arm: Arm) -> str:
    """Say which seeds an arm has."""
    seeds = [str(run.seed) for run in arm.runs if run.seed is not None]
    return ", ".join(seeds)


def objective_of(run: Run) -> str | None:
    """Give the objective's settings as text, by which losses of two runs can be compared; None where not known."""
    found = section(run.config, "objective")
    return json.dumps(found, sort_keys=True, default=str) if found else None
