"""From folders to the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from peer_scale.errors import UserError
from peer_scale.reporting import experiments, naming, tables
from peer_scale.reporting.arms import Arm, arms_of, objective_of
from peer_scale.reporting.experiments import EXPERIMENT, Experiment, read_experiment
from peer_scale.reporting.figures import curve_figures
from peer_scale.reporting.page import Card, Page, render
from peer_scale.reporting.runs import RUN_YAML, Run, find_runs, read_run
from peer_scale.reporting.score_figures import score_figures
from peer_scale.storage import write_atomically

_MOST_CARDS = 10


def write_report(paths: Sequence[Path], output: Path, title: str | None = None) -> None:
    """Write the page of the runs in `paths`, or of the experiment that the only one is.

    Raises:
        UserError: a path holds no run, an experiment is given among others, or the page cannot be written.
    """
    own = [path for path in paths if (path / EXPERIMENT).is_file()]
    if own and len(paths) > 1:
        raise UserError(f"{own[0]}: is an experiment's folder, which has a page of its own; give it alone")
    text = page_of_experiment(read_experiment(own[0]), title) if own else page_of_runs(read_runs(paths), title)
    try:
        write_atomically(output, text.encode())
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read all runs in `paths`, each once; UserError where one of the paths holds none."""
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in find_runs(path)))
    return [read_run(folder, name) for folder, name in zip(folders, _names_of(folders), strict=True)]


def _names_of(folders: Sequence[Path]) -> list[str]:
    """Give each folder's name with as many of those above it as tell it from the others."""
    if len(folders) == 1:
        return [folders[0].name]
    common = os.path.commonpath(folders)
    return [os.path.relpath(folder, common) if str(folder) != common else folder.name for folder in folders]


def page_of_runs(runs: Sequence[Run], title: str | None = None) -> str:
    """Give the page of runs, as HTML."""
    arms = arms_of(runs)
    figures, axis_tables = curve_figures(arms)
    found = [
        tables.results(arms),
        tables.configuration_differences(arms),
        tables.fine_tunings(runs),
    ]
    sources = [tables.time_spent(runs), tables.provenance(runs)]
    return render(
        Page(
            title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
            sentence=sentence(arms),
            notes=_notes(runs),
            cards=_cards(runs[0]) if len(runs) == 1 else (),
            arms=tuple(arms),
            tables=tuple(table for table in found if table is not None),
            figures=tuple(figures),
            axis_tables=tuple(axis_tables),
            configurations=configurations(runs),
            sources=tuple(table for table in sources if table is not None),
        )
    )


def page_of_experiment(experiment: Experiment, title: str | None = None) -> str:
    """Give the page of an experiment, as HTML."""
    runs = [run for arm in experiment.arms for run in arm.runs]
    trained = [arm for arm in experiment.arms if any(run.last_step for run in arm.runs)]
    curves, axis_tables = curve_figures(trained)
    found = [
        experiments.score_table(experiment),
        experiments.change_table(experiment),
        *experiments.test_tables(experiment),
        experiments.paper_table(experiment),
        experiments.cost_table(experiment),
        *([tables.results(trained)] if trained else []),
    ]
    sources = [tables.time_spent(runs), tables.provenance(runs)]
    return render(
        Page(
            title=title or experiment.title,
            sentence=experiment.sentence or sentence(trained),
            notes=_notes([run for run in runs if run.folder is not None]),
            cards=(),
            arms=experiment.arms,
            tables=tuple(table for table in found if table is not None),
            figures=(*score_figures(experiment), *curves),
            axis_tables=tuple(axis_tables),
            configurations=configurations(runs),
            sources=tuple(table for table in sources if table is not None),
        )
    )


def configurations(runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    """Give each run's name and its run.yaml."""
    found = []
    for run in runs:
        try:
            text = "" if run.folder is None else (run.folder / RUN_YAML).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if text:
            found.append((run.name, text))
    return tuple(found)


def _notes(runs: Sequence[Run]) -> tuple[str, ...]:
    empty = [run.name for run in runs if not run.last_step and not run.scores]
    notes = [f"Without a single step: {', '.join(empty)}."] if empty else []
    unread = sum(run.unread for run in runs)
    if unread:
        notes.append(f"{unread:,} lines of metrics.jsonl could not be read and are left out.")
    return tuple(notes)


def sentence(arms: Sequence[Arm]) -> str:
    """Say in one sentence what came out."""
    with_steps = [arm for arm in arms if arm.counted]
    if not with_steps:
        return "Nothing has been trained yet."
    if len(with_steps) == 1:
        return _of_one_arm(with_steps[0])
    name = _comparable(with_steps)
    number = f"{sum(len(arm.runs) for arm in arms)} runs of {len(arms)} configurations"
    if name is None:
        return f"{number}; they have no metric in common by which they could be compared."
    sign = 1 if naming.is_loss(name) else -1
    ranked = sorted(with_steps, key=lambda arm: sign * float(np.mean(arm.values(name))))
    best, second = ranked[:2]
    alone = min(len(best.values(name)), len(second.values(name))) < 2
    doubt = " With one run on a side, this may be chance." if alone else ""
    word = "lowest" if sign == 1 else "highest"
    return (
        f"Of {number}, {best.label} ends with the {word} {naming.in_text(name)}: "
        f"{tables.mean_and_deviation(best.values(name))} (n = {len(best.values(name))}), against "
        f"{tables.mean_and_deviation(second.values(name))} (n = {len(second.values(name))}) of {second.label}.{doubt}"
    )


def _of_one_arm(arm: Arm) -> str:
    runs = arm.counted
    run = runs[0]
    names = sorted(filter(tables.is_result, run.columns), key=lambda name: naming.order(naming.base(name)))
    held_out = [name for name in names if name.startswith("validation_") and naming.is_loss(name)][:1]
    told = (held_out or [name for name in names if naming.is_loss(name)][:1]) + [
        name for name in names if not naming.is_loss(name) and not name.startswith("validation_")
    ][:2]
    values = ", ".join(f"{naming.in_text(name)} {tables.mean_and_deviation(arm.values(name))}" for name in told)
    done = f"{run.last_step:,} steps" + ("" if run.is_whole else f" of {run.wanted_steps or 0:,}")
    cost = [done]
    for name, unit, written in (("tokens", "tokens", naming.scaled), ("train_flops", "FLOPs", naming.number)):
        if name in run.columns:
            cost.append(f"{written(float(np.nanmax(run.columns[name])))} {unit}")
    took = f" in {naming.span(float(run.columns['time_s'][-1]))}" if "time_s" in run.columns else ""
    seeds = "" if len(arm.runs) == 1 else f" (mean of {len(runs)} seeds)"
    model = run.config.get("name") or arm.label
    verb = "reached" if run.is_whole else "stands at"
    return f"{model} {verb} {values or 'no result'} after {', '.join(cost)}{took}{seeds}."


def _comparable(arms: Sequence[Arm]) -> str | None:
    """Give the metric that says most of which arm is best: a loss only where all arms have the same objective."""
    common = set.intersection(*(set(run.columns) for arm in arms for run in arm.counted))
    same = len({objective_of(run) for arm in arms for run in arm.counted}) == 1
    losses = sorted((name for name in common if naming.is_loss(name)), key=lambda name: naming.order(naming.base(name)))
    others = (name for name in common if tables.is_result(name) and not naming.is_loss(name))
    names = [*(losses if same else ()), *sorted(others, key=lambda name: naming.order(naming.base(name)))]
    names.sort(key=lambda name: (not naming.is_loss(name), name == naming.base(name)))
    return next((name for name in names if all(len(arm.values(name)) for arm in arms)), None)


def _cards(run: Run) -> tuple[Card, ...]:
    """Give a run's numbers that people ask for first."""
    cards = []
    names = sorted(filter(tables.is_result, run.columns), key=lambda name: naming.order(naming.base(name)))
    losses = [name for name in names if naming.base(name) == "loss"]
    shown = sorted(losses, key=lambda name: not name.startswith("validation_"))[:1]
    shown += [name for name in names if name.endswith(("_accuracy", "_auc")) and name == naming.base(name)][:3]
    for name in shown:
        cards.append(Card(naming.title(name), naming.number(run.last(name)), _best(run, name)))
    for name, label, note, written in (
        ("tokens", "Tokens", "without padding", naming.scaled),
        ("train_flops", "FLOPs", "the paper's accounting", naming.number),
    ):
        if name in run.columns:
            cards.append(Card(label, written(float(np.nanmax(run.columns[name]))), note))
    if "time_s" in run.columns:
        cards.append(Card("Time", naming.span(float(run.columns["time_s"][-1])), "of steps"))
    if "tokens_per_second" in run.columns:
        speed = float(np.nanmedian(run.columns["tokens_per_second"])) / (run.world_size or 1)
        cards.append(
            Card("Tokens per second", naming.scaled(speed), "per device, median" if run.world_size else "median")
        )
    if "mfu" in run.columns:
        cards.append(Card("MFU", f"{np.nanmedian(run.columns['mfu']):.1%}", "model FLOPs utilisation, median"))
    goodput, memory = run.summary.get("goodput"), run.summary.get("peak_memory_bytes")
    if isinstance(goodput, (int, float)):
        cards.append(Card("Goodput", f"{goodput:.1%}", "of the time was training"))
    if isinstance(memory, (int, float)):
        cards.append(Card("Memory", f"{memory / 2**30:.3g} GiB", "peak per device"))
    if run.restarts or len(run.skipped):
        cards.append(Card("Restarts", str(len(run.restarts)), f"{len(run.skipped)} steps skipped"))
    return tuple(cards[:_MOST_CARDS])


def _best(run: Run, name: str) -> str:
    values = run.columns[name]
    at = int(np.nanargmin(values) if naming.is_loss(name) else np.nanargmax(values))
    return f"best {naming.number(float(values[at]))} at step {int(run.steps[at]):,}"
