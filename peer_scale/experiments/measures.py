"""The measures of an experiment: what they are called, what they are made of, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peer_scale.experiments.config import ALL, AVERAGE, ExperimentConfig, FinetuneConfig, TaskConfig
from peer_scale.experiments.curves import look_up

PROBE, FINETUNE, HELD_OUT = "probe", "finetune", "held-out"


@dataclass(frozen=True)
class Measure:
    """One number per run.

    Attributes:
        group: `probe`, `finetune-all`, `finetune-1000`, ... or `held-out`.
        of: a task's name, `average`, or a metric of pre-training.
        label: for people.
        higher_is_better: the direction.
    """

    group: str
    of: str
    label: str
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        """What files call it."""
        return f"{self.group}/{self.of}"

    @property
    def is_of_tasks(self) -> bool:
        """Whether it is a score from 0 to 1 (a correlation from -1) of one task or of the mean of several."""
        return self.group != HELD_OUT


@dataclass(frozen=True)
class Measurement:
    """One call of `peer-scale finetune`: a model on a task, with so many training examples."""

    kind: Literal["probe", "finetune"]
    task: TaskConfig
    size: int | Literal["all"]
    options: Mapping[str, Any]

    @property
    def group(self) -> str:
        """The group of its measure."""
        return PROBE if self.kind == PROBE and self.size == ALL else f"{self.kind}-{self.size}"

    @property
    def measure(self) -> str:
        """The name of its measure."""
        return f"{self.group}/{self.task.name}"


def measurements(config: ExperimentConfig) -> tuple[Measurement, ...]:
    """List what is done with each model, the cheap before the dear."""
    found = []
    kinds: tuple[tuple[Literal["probe", "finetune"], FinetuneConfig | None], ...]
    kinds = (("probe", config.probe), ("finetune", config.finetune))
    for kind, how in kinds:
        for size in how.sizes if how is not None else ():
            for task in config.tasks:
                options = {**((how and how.options) or {}), **((kind == FINETUNE and task.options) or {})}
                found.append(Measurement(kind, task, size, options))
    return tuple(found)


def measures(config: ExperimentConfig) -> tuple[Measure, ...]:
    """List all measures, those of a group together and their mean at the end."""
    found: list[Measure] = []
    groups: dict[str, list[Measurement]] = {}
    for each in measurements(config):
        groups.setdefault(each.group, []).append(each)
    for group, members in groups.items():
        found += [Measure(group, each.task.name, each.task.label or each.task.name) for each in members]
        if len(members) > 1:
            found.append(Measure(group, AVERAGE, f"mean of {len(members)} tasks"))
    for figure in config.held_out:
        found.append(Measure(HELD_OUT, figure.metric, figure.label or figure.metric, figure.higher_is_better))
    return tuple(found)


def with_averages(config: ExperimentConfig, scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Add the means over each group's tasks; None where a task's score is missing."""
    complete = dict(scores)
    for measure in measures(config):
        if measure.of == AVERAGE and measure.is_of_tasks:
            parts = [scores.get(each.measure) for each in measurements(config) if each.group == measure.group]
            present = [part for part in parts if part is not None]
            complete[measure.name] = sum(present) / len(present) if len(present) == len(parts) else None
    return complete


def held_out_scores(config: ExperimentConfig, last: Mapping[str, Any]) -> dict[str, float | None]:
    """Look the held-out measures up in the last step's metrics; None of those that the objective does not have."""
    return {f"{HELD_OUT}/{each.metric}": look_up(last, each.metric) for each in config.held_out}
