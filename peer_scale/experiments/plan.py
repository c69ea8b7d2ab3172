"""What an experiment is about to do: each arm's settings, steps, tokens, FLOPs and time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from peer_scale.errors import UserError
from peer_scale.experiments.budget import StepCosts, TextFacts, Texts, step_costs, steps_within
from peer_scale.experiments.config import RANDOM, TFIDF, ArmConfig, ExperimentConfig, flat, merged
from peer_scale.settings.config_file import config_of
from peer_scale.settings.flags import build_parser
from peer_scale.settings.presets import find_preset
from peer_scale.settings.resolve import resolve
from peer_scale.settings.run import RunConfig

# One step at a rate that moves no weight by a bit: a checkpoint of the model as it is initialised, with its tokenizer
# and its held-out figures, made as all others are.
_UNTRAINED: Final = {"training": {"train_iters": 1, "lr": 1e-30, "lr_warmup_iters": 0, "weight_decay": 0.0}}
_SAVINGS = 20  # per run: what a kill loses is a twentieth
# settings that say how a run is carried out, not what is learned
_OF_THE_MACHINE = ("micro_batch_size", "micro_batch_tokens", "activation_checkpointing", "compile")


@dataclass(frozen=True)
class ArmPlan:
    """One arm, ready to be run.

    Attributes:
        arm: what the file says of it.
        seeds: of its runs.
        steps: optimizer steps of each; 0 where nothing is trained.
        settings: for the trainer's --config, but for the seed; None: there is no model.
        costs: of one step; None: there is no model.
        fingerprint: of all that decides what is learned; results with another one are another arm's.
        measured_steps: the checkpoints that are measured, the last one at the end.
    """

    arm: ArmConfig
    seeds: tuple[int, ...]
    steps: int
    settings: Mapping[str, Any] | None
    costs: StepCosts | None
    fingerprint: str
    measured_steps: tuple[int, ...]

    @property
    def changes(self) -> dict[str, Any]:
        """What sets the arm apart, by dotted keys."""
        named = {} if self.arm.model is None else {"model": self.arm.model}
        return {**named, **flat(self.arm.changes)}

    def settings_of(self, seed: int) -> dict[str, Any]:
        """Give the content of --config for one run."""
        assert self.settings is not None
        return {**self.settings, "seed": seed}


@dataclass(frozen=True)
class RunName:
    """One arm with one pre-training seed; its text form names folders, files and jobs."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-s{self.seed}"


@dataclass(frozen=True)
class Plan:
    """All arms in the file's order."""

    config: ExperimentConfig
    arms: Mapping[str, ArmPlan]

    @property
    def runs(self) -> tuple[RunName, ...]:
        """All runs, seed by seed, so that the first finished ones are of all arms."""
        runs = [(turn, RunName(name, seed)) for name, arm in self.arms.items() for turn, seed in enumerate(arm.seeds)]
        return tuple(run for _, run in sorted(runs, key=lambda each: each[0]))


def make_plan(config: ExperimentConfig, path: Path, texts: Texts | None) -> Plan:
    """Decide each arm's steps and settings.

    Args:
        config: the experiment.
        path: its file, for messages.
        texts: opens the arms' text; None: the model's own vocabulary size is taken, and full sequences.

    Raises:
        UserError: an arm's settings do not hold together, or the text cannot be used.
    """
    return Plan(config, {arm.name: _plan_arm(config, arm, path, texts) for arm in config.all_arms})


def _plan_arm(config: ExperimentConfig, arm: ArmConfig, path: Path, texts: Texts | None) -> ArmPlan:
    seeds = config.seeds_of(arm)
    if arm.kind == TFIDF:
        return ArmPlan(arm, seeds, 0, None, None, _digest({"kind": TFIDF}), (0,))
    where = Path(f"{path}: arm {arm.name}")
    said = merged({"name": arm.model}, config.common, arm.changes)
    run = resolved(said, where)
    costs = step_costs(run, TextFacts() if texts is None else texts.facts(run))
    if arm.kind == RANDOM:
        settings = merged(said, _UNTRAINED, {"output": _output(said, 1, 1)})
        return ArmPlan(arm, seeds, 0, settings, costs, fingerprint(resolved(settings, where), arm.kind), (1,))
    steps = arm.steps
    if steps is None:
        assert config.budget is not None
        steps = steps_within(config.budget, costs)
    measured = measured_steps(steps, config.checkpoints)
    training: dict[str, Any] = {"train_iters": steps}
    if "lr_warmup_iters" not in said.get("training", {}):
        # as --train-iters alone does it: the preset's share of the steps
        preset = find_preset(run.name).training
        training["lr_warmup_iters"] = min(steps, round(preset.lr_warmup_iters / preset.train_iters * steps))
    settings = merged(said, {"training": training, "output": _output(said, steps, config.checkpoints)})
    digest = fingerprint(resolved(settings, where), arm.kind)
    return ArmPlan(arm, seeds, steps, settings, costs, digest, measured)


def resolved(settings: Mapping[str, Any], where: Path) -> RunConfig:
    """Check settings as the trainer would; UserError that begins with `where`."""
    file = config_of(dict(settings), where)
    try:
        args = build_parser().parse_args(["--save", "checkpoints"])  # each run has a folder: see pretraining
        return resolve(args, 1, os.environ, file=file)
    except UserError as error:
        message = str(error)
        raise error if message.startswith(str(where)) else UserError(f"{where}: {message}") from None


def measured_steps(steps: int, checkpoints: int) -> tuple[int, ...]:
    """Give the steps after which a run is measured: each multiple of a part of it, and the last one."""
    part = max(1, steps // checkpoints)
    return (*(part * number for number in range(1, checkpoints) if part * number < steps), steps)


def fingerprint(run: RunConfig, kind: str) -> str:
    """Digest what decides what is learned, but for the seed and the text itself."""
    training = {name: value for name, value in asdict(run.training).items() if name not in _OF_THE_MACHINE}
    learned = {
        "kind": kind,
        "model": asdict(run.model),
        "objective": run.objective.section(),
        "masking": asdict(run.masking),
        "training": training,
        "validation_fraction": run.data.validation_fraction,
        "init_from": run.output.init_from,
    }
    return _digest(learned)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _output(said: Mapping[str, Any], steps: int, checkpoints: int) -> dict[str, Any]:
    """Say how often a run is saved and validated, where the file does not."""
    output: dict[str, Any] = {"keep_last": 2}
    interval = max(1, steps // _SAVINGS)
    if checkpoints > 1:
        part = max(1, steps // checkpoints)
        output["keep_every"] = part
        interval = next(each for each in range(min(interval, part), 0, -1) if part % each == 0)
    output |= {"save_interval": interval, "eval_interval": max(1, steps // _SAVINGS)}
    if said.get("data", {}).get("validation_fraction") == 0:
        del output["eval_interval"]
    given = said.get("output") or {}
    if checkpoints > 1 and "save_interval" in given and output["keep_every"] % given["save_interval"]:
        raise UserError(
            f"output.save_interval {given['save_interval']} does not divide {output['keep_every']}, the steps between "
            f"the {checkpoints} checkpoints that are measured; leave it out"
        )
    return {**output, **given}
