"""What an experiment's YAML file says: arms, seeds, a budget, tasks; typed, and checked before anything runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from peer_scale.configuration import configuration, option, shown
from peer_scale.errors import UserError
from peer_scale.settings.names import hint
from peer_scale.settings.run import Seed

PRETRAINED, RANDOM, TFIDF = "pretrained", "random", "tfidf"
ALL = "all"
"""Of a task's sizes: all of its training examples."""

AVERAGE = "average"
"""The measure that is the mean over the tasks of a group."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]
_Share = Annotated[float, Field(gt=0, lt=1)]
_Sizes = Annotated[tuple[PositiveInt | Literal["all"], ...], Field(min_length=1)]
# settings that each run gets from the experiment
_OWN = {
    "name": "each arm has its own `model`",
    "seed": "`seeds` says them",
    "training.train_iters": "the budget, or an arm's `steps`, says them",
    "output.save": "each run has its own folder",
    "output.log_dir": "each run has its own folder",
    "output.load": "each run begins afresh",
    "output.keep_every": "`checkpoints` says what is kept",
}


@configuration
class BudgetConfig:
    """The FLOPs of pre-training that each arm gets."""

    flops: PositiveFloat = option(help="FLOPs of one pre-training run.")
    accounting: Literal["paper", "actual"] = option(
        default="paper", help="How they are counted: as in the paper's tables, or the matrix products that are run."
    )


@configuration
class ArmConfig:
    """One of the things compared; `changes` are its trainer settings by section, over those that all arms have."""

    name: str = option(help="What files and tables call it.")
    label: str | None = option(default=None, help="What people are shown.")
    kind: Literal["pretrained", "random", "tfidf"] = option(
        default=PRETRAINED,
        help="pretrained; random, the model as it is initialised; or tfidf, TF-IDF under a linear model.",
    )
    model: str | None = option(default=None, help="Preset, as the trainer's --model: objective and size.")
    branch: str | None = option(
        default=None, help="Which network is measured, as the --branch of peer-scale convert to-hf."
    )
    steps: PositiveInt | None = option(default=None, help="Optimizer steps, in place of what the budget allows.")
    seeds: _Seeds | None = option(default=None, help="Pre-training seeds, in place of the experiment's.")
    changes: dict[str, Any] | None = option(default=None, help="Trainer settings by section.")

    def __post_init__(self) -> None:
        _require_name(self.name)

    def require_whole(self) -> None:
        """Raise UserError where what is said does not make an arm; a variant has the rest from another one."""
        if self.kind == TFIDF and (self.model or self.branch or self.steps or self.changes):
            raise UserError(f"arm {self.name} is tfidf, which has no model, branch, steps or changes")
        if self.kind != TFIDF and self.model is None:
            raise UserError(f"arm {self.name} needs a model, such as peer-small")
        if self.kind == RANDOM and self.steps is not None:
            raise UserError(f"arm {self.name} is random: it is not trained, so steps say nothing")

    @property
    def shown_name(self) -> str:
        """What people are shown."""
        return self.label or self.name


@configuration
class TaskConfig:
    """A task that the models are measured on."""

    name: str = option(help="What files and tables call it.")
    path: str | None = option(default=None, help="Folder of the task's data; default: a task that is known by name.")
    label: str | None = option(default=None, help="What people are shown.")
    options: dict[str, Any] | None = option(
        default=None, help="Settings of peer-scale finetune, of this task alone, over those of `finetune`."
    )

    def __post_init__(self) -> None:
        _require_name(self.name)
        if self.name == AVERAGE:
            raise UserError(f"a task cannot be called {AVERAGE}: that is the mean over all")


@configuration
class FinetuneConfig:
    """How the models are fine-tuned, or how a linear model is fitted to their frozen states."""

    sizes: _Sizes = option(default=(ALL,), help="Numbers of training examples; each is a measure of its own.")
    options: dict[str, Any] | None = option(
        default=None, help="Settings of peer-scale finetune, or of a probe: data_dir, layers, max_length, seeds."
    )


@configuration
class HeldOutConfig:
    """A figure of the text held out in pre-training, or of the last training step."""

    metric: str = option(help="Key of metrics.jsonl; a slash leads into an object.")
    higher_is_better: bool = option(help="Which direction is better.")
    label: str | None = option(default=None, help="What people are shown.")


@configuration
class AblationConfig:
    """Variants of one arm, which are compared with it and with each other; their changes come on top of its own."""

    name: str = option(help="What tests and tables call it.")
    of: str = option(help="The arm that they are variants of.")
    arms: tuple[ArmConfig, ...] = ()

    def __post_init__(self) -> None:
        _require_name(self.name)


@configuration
class PaperConfig:
    """The published numbers of the same experiment."""

    table: str = option(help="Where they stand in the paper.")
    rows: dict[str, dict[str, float]] = option(help="Arm, measure, number as printed: scores in per cent.")
    remarks: str | None = option(default=None, help="What to know of them.")


@configuration
class ExperimentConfig:
    """One experiment. `common` are the trainer's settings of all arms, by section."""

    name: str = option(help="What files call it.")
    title: str | None = option(default=None, help="What people are shown.")
    seeds: _Seeds = option(default=(1,), help="Pre-training seeds of each arm.")
    common: dict[str, Any] | None = option(default=None, help="Trainer settings of all arms, by section.")
    checkpoints: PositiveInt = option(
        default=1, help="At how many equal parts of pre-training the models are measured; the last is its end."
    )
    alpha: _Share = option(default=0.05, help="Level of significance, after Holm's correction.")
    primary: str | None = option(default=None, help="The measure that the result's sentence is about.")
    budget: BudgetConfig | None = None
    arms: tuple[ArmConfig, ...] = ()
    ablations: tuple[AblationConfig, ...] = ()
    tasks: tuple[TaskConfig, ...] = ()
    probe: FinetuneConfig | None = None
    finetune: FinetuneConfig | None = None
    held_out: tuple[HeldOutConfig, ...] = ()
    paper: PaperConfig | None = None

    def __post_init__(self) -> None:
        _require_name(self.name)
        if not self.arms:
            raise UserError("arms: name one or more")
        _require_single("arms", (arm.name for arm in self.all_arms))
        _require_single("tasks", (task.name for task in self.tasks))
        _require_single("ablations", (ablation.name for ablation in self.ablations))
        for arm in self.all_arms:
            arm.require_whole()
            if arm.kind == PRETRAINED and arm.steps is None and self.budget is None:
                raise UserError(f"arm {arm.name} has no steps, and there is no budget: give one of them")
            for seed, count in Counter(self.seeds_of(arm)).items():
                if count > 1:
                    raise UserError(f"arm {arm.name}: seed {seed} stands twice")
            for where in ("common", "changes"):
                _require_not_own(self.common if where == "common" else arm.changes, f"arm {arm.name}: {where}")
        if bool(self.tasks) != (self.probe is not None or self.finetune is not None):
            raise UserError("tasks go with probe or finetune, which say what is done with them")

    @property
    def all_arms(self) -> tuple[ArmConfig, ...]:
        """The arms, then those of the ablations with what they have from the arm that they are variants of."""
        by_name = {arm.name: arm for arm in self.arms}
        found = list(self.arms)
        for ablation in self.ablations:
            if ablation.of not in by_name:
                raise UserError(f"ablation {ablation.name}: no arm {ablation.of}{hint(ablation.of, by_name)}")
            found += [_variant(arm, by_name[ablation.of]) for arm in ablation.arms]
        return tuple(found)

    def seeds_of(self, arm: ArmConfig) -> tuple[int, ...]:
        """Give the pre-training seeds of an arm; one of tfidf, which would come out the same every time."""
        if arm.seeds is not None:
            return arm.seeds
        return self.seeds[:1] if arm.kind == TFIDF else self.seeds

    @property
    def families(self) -> dict[str, tuple[str, ...]]:
        """Names of the arms that are compared pairwise: the pre-trained ones, and those of each ablation."""
        trained = {arm.name for arm in self.all_arms if arm.kind == PRETRAINED}
        groups = {"arms": tuple(arm.name for arm in self.arms)}
        groups |= {each.name: (each.of, *(arm.name for arm in each.arms)) for each in self.ablations}
        return {name: tuple(arm for arm in arms if arm in trained) for name, arms in groups.items()}


def merged(*sections: Mapping[str, Any] | None) -> dict[str, Any]:
    """Put nested mappings over each other, the last on top."""
    result: dict[str, Any] = {}
    for section in sections:
        for key, value in (section or {}).items():
            below = result.get(key)
            both = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[key] = merged(below, value) if both else value
    return result


def flat(section: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """Name nested values by their dotted keys."""
    result: dict[str, Any] = {}
    for key, value in (section or {}).items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def _variant(arm: ArmConfig, base: ArmConfig) -> ArmConfig:
    # of the fields that say what is trained, those that the variant leaves open are the base's
    return replace(
        arm,
        model=arm.model or base.model,
        branch=arm.branch or base.branch,
        steps=arm.steps or base.steps,
        seeds=arm.seeds or base.seeds,
        changes=merged(base.changes, arm.changes),
    )


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"name is {shown(name)}; it must be letters, digits, dots, hyphens and underscores")


def _require_single(what: str, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{what}: {twice[0]} stands twice")


def _require_not_own(section: Mapping[str, Any] | None, where: str) -> None:
    for key in flat(section):
        if key in _OWN:
            raise UserError(f"{where}.{key}: cannot be set here: {_OWN[key]}")
