"""Fine-tunings and probes of an experiment's models, in processes of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peer_scale.experiments.config import ALL
from peer_scale.experiments.measures import PROBE, Measurement
from peer_scale.experiments.processes import ProgramError, Programs, command
from peer_scale.storage import read_json_object, write_atomically

_RESULTS, _DONE = "results.json", "done.json"


def measure(model: Path, wanted: Sequence[Measurement], folder: Path, programs: Programs, log: Path) -> dict[str, Any]:
    """Fine-tune and probe a model, or go on with that; give what was found, by measure.

    Each entry is a task's of results.json: `mean` over the fine-tunings is the model's score.

    Raises:
        ProgramError: a fine-tuning failed.
    """
    found: dict[str, Any] = {}
    for name, batch in batches(wanted).items():
        output = folder / name
        words = measuring_command(model, batch, output)
        if (read_json_object(output / _DONE) or {}).get("command") != words:
            programs.check(words, log)
            write_atomically(output / _DONE, json.dumps({"command": words}).encode())
        tasks = (read_json_object(output / _RESULTS) or {}).get("tasks")
        if not isinstance(tasks, Mapping) or len(tasks) != len(batch):
            raise ProgramError(f"{output / _RESULTS}: must have the results of {len(batch)} tasks")
        # in the order asked for: a task's own name may be another one than the experiment's
        found |= {each.measure: entry for each, entry in zip(batch, tasks.values(), strict=True)}
    return found


def batches(wanted: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Put together what one process does: tasks of a group with the same options; by the names of their folders."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for each in wanted:
        found.setdefault((each.group, json.dumps(each.options, sort_keys=True)), []).append(each)
    counts: dict[str, int] = {}
    named = {}
    for (group, _), batch in found.items():
        number = counts[group] = counts.get(group, 0) + 1
        named[group if number == 1 else f"{group}-{number}"] = batch
    return named


def measuring_command(model: Path, batch: Sequence[Measurement], output: Path) -> list[str]:
    """Give the command line of measurements that differ in their tasks alone."""
    first = batch[0]
    tasks = [each.task.path or each.task.name for each in batch]
    options = dict(first.options)
    if first.kind == PROBE:
        words = [sys.executable, "-m", "peer_scale.experiments.probing"]
    else:
        words = command("finetune")
        options = {"save_model": False, **options}
    words += ["--model", str(model), "--output-dir", str(output), "--task", *tasks]
    if first.size != ALL:
        words += ["--max-train-examples", str(first.size)]
    return [*words, *flags(options)]


def flags(options: Mapping[str, Any]) -> list[str]:
    """Give settings as flags: a switch by its name, a list as several values."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{flag}", *map(str, values)]
    return words
