"""Anyone's data: a folder with task.json and TSV files, or CSV, TSV and JSONL files with named columns."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from peer_scale.errors import UserError
from peer_scale.finetuning.lines import bad_line, number_in, numbered_lines, tab_separated
from peer_scale.finetuning.metrics import default_metric
from peer_scale.finetuning.tasks import Examples, Kind, Metric, Task, TaskData

TASK_FILE = "task.json"
_ENDINGS = (".csv", ".tsv", ".jsonl")
_NAME = re.compile(r"\w[\w.-]*")
_HELD_OUT = 0.1
_TEXT_COLUMNS = (("text",), ("text_a", "text_b"))


@dataclass(frozen=True)
class Row:
    """A line of a file: its number and its values by column."""

    line: int
    values: dict[str, Any]


def read_task_folder(folder: Path) -> TaskData:
    """Read train.tsv, dev.tsv and, where it is there, test.tsv, as task.json says.

    Raises:
        UserError: a file is missing or not what it must be; the message names the file and the line.
    """
    path = folder / TASK_FILE
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        task = Task(
            str(told["name"]), told["kind"], told["metric"], tuple(told["columns"]), str(told.get("label", "label"))
        )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        missing = f"no {error}" if isinstance(error, KeyError) else "not a JSON object of a task"
        raise UserError(f"{path}: {missing}; it must have name, kind, metric and columns") from None
    for key, value, known in (("kind", task.kind, get_args(Kind)), ("metric", task.metric, get_args(Metric))):
        if value not in known:
            raise UserError(f"{path}: {key} is {value!r}; it must be one of {', '.join(known)}")
    test = folder / "test.tsv"
    return read_files(task, folder / "train.tsv", folder / "dev.tsv", test if test.is_file() else None)


def task_of_files(
    train: Path, columns: tuple[str, ...], label: str, kind: Kind, metric: Metric | None, name: str | None = None
) -> Task:
    """Describe the task of a user's files; without `columns` the train file's own names must say which are texts."""
    columns = columns or _text_columns(train, label)
    chosen = metric or default_metric(is_regression=kind == "regression")
    return Task(name or train.stem, kind, chosen, columns, label)


def read_files(task: Task, train: Path, dev: Path | None, test: Path | None) -> TaskData:
    """Read the files of a task; without a dev file a tenth of the training examples is held out, by a fixed seed.

    The classes are the labels of the train file: in the order of their numbers where all are whole numbers, otherwise
    of their letters. A test file without the label's column is predicted, not scored.

    Raises:
        UserError: a file or a line is not what it must be, or a label is not among those of the train file.
    """
    if not _NAME.fullmatch(task.name):
        raise UserError(f"the task is called {task.name!r}; it must be letters, digits, ., _ and -: a folder's name")
    if (task.metric == "pearson_spearman") != task.is_regression:
        raise UserError(f"the metric {task.metric} does not go with {task.kind}")
    if len(task.columns) not in (1, 2):
        raise UserError(f"the text columns are {', '.join(task.columns)}; there must be one or two")
    rows = list(read_rows(train))
    if not task.is_regression:
        task = replace(task, labels=_classes(train, rows, task))
    else:
        numbers = [number_in(_label(train, row, task), train, row.line) for row in rows]
        low, high = min(numbers, default=0.0), max(numbers, default=1.0)
        task = replace(task, scale=(low, high) if high > low else (low, low + 1))
    examples = _examples(train, rows, task)
    notes = []
    if dev is None:
        order = random.Random(0).sample(range(len(examples)), len(examples))
        count = max(1, round(_HELD_OUT * len(examples)))
        held_out, examples = examples.take(sorted(order[:count])), examples.take(sorted(order[count:]))
        notes.append(f"no dev file: {count:,} of the {len(order):,} examples of {train} are held out")
        if not len(examples):
            raise UserError(f"{train}: one example is not enough to train on and to hold out")
    else:
        held_out = _examples(dev, list(read_rows(dev)), task)
    tests = {}
    if test is not None:
        test_rows = list(read_rows(test))
        has_labels = bool(test_rows) and task.label in test_rows[0].values
        tests["test"] = _examples(test, test_rows, task, has_labels=has_labels)
    return TaskData(task, examples, {"dev": held_out}, tests, tuple(notes))


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a CSV, TSV or JSONL file, told by its ending.

    CSV has quotes as RFC 4180 says; in TSV quotes are text. Both begin with a header. A line of JSONL is an object.
    """
    if path.suffix not in _ENDINGS:
        raise UserError(f"{path}: the file's ending must be one of {', '.join(_ENDINGS)}")
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
        return
    lines = _read_csv(path) if path.suffix == ".csv" else tab_separated(path)
    header: list[str] | None = None
    for number, fields in lines:
        if header is None:
            header = fields
        elif len(fields) != len(header):
            raise bad_line(path, number, f"{len(fields)} columns, but the header has {len(header)}")
        else:
            yield Row(number, dict(zip(header, fields, strict=True)))


def _read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((f"{line}\n" for _, line in numbered_lines(path)), strict=True)
    begin = 1
    try:
        for fields in reader:
            if fields:
                yield begin, fields
            begin = reader.line_num + 1
    except csv.Error as error:
        raise bad_line(path, begin, f"not CSV: {error}") from None


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise bad_line(path, number, "not JSON") from None
        if not isinstance(values, dict):
            raise bad_line(path, number, "not a JSON object")
        yield Row(number, values)


def _text_columns(path: Path, label: str) -> tuple[str, ...]:
    first = next(read_rows(path), None)
    if first is None:
        raise UserError(f"{path}: holds no examples")
    found = list(first.values)
    for columns in _TEXT_COLUMNS:
        if set(columns) <= set(found):
            return columns
    others = [column for column in found if column != label]
    if len(others) == 1:
        return tuple(others)
    raise UserError(f"{path}: --text-columns must say which are texts; the file has {', '.join(found)}")


def _classes(path: Path, rows: list[Row], task: Task) -> tuple[str, ...]:
    found = {_label(path, row, task) for row in rows}
    if len(found) == 1:
        raise UserError(f"{path}: all labels are {next(iter(found))!r}; there must be two classes or more")
    try:
        return tuple(sorted(found, key=int))
    except ValueError:
        return tuple(sorted(found))


def _examples(path: Path, rows: list[Row], task: Task, *, has_labels: bool = True) -> Examples:
    if not rows:
        raise UserError(f"{path}: holds no examples")
    texts = [tuple(_text(path, row, column) for column in task.columns) for row in rows]
    if not has_labels:
        return Examples(texts, None)
    written = [_label(path, row, task) for row in rows]
    if task.is_regression:
        numbers = [number_in(text, path, row.line) for text, row in zip(written, rows, strict=True)]
        return Examples(texts, np.array(numbers, np.float32))
    ids = {name: number for number, name in enumerate(task.labels)}
    for name, row in zip(written, rows, strict=True):
        if name not in ids:
            shown = ", ".join(task.labels[:10])
            raise bad_line(path, row.line, f"the label is {name!r}; the train file has {shown}")
    return Examples(texts, np.array([ids[name] for name in written], np.int64))


def _text(path: Path, row: Row, column: str) -> str:
    value = _value(path, row, column)
    if not isinstance(value, str):
        raise bad_line(path, row.line, f"{column!r} is {json.dumps(value)}; it must be a text")
    return value


def _label(path: Path, row: Row, task: Task) -> str:
    value = _value(path, row, task.label)
    if value is None or isinstance(value, dict | list) or value == "":
        raise bad_line(
            path, row.line, f"the label {task.label!r} is {json.dumps(value)}; it must be a word or a number"
        )
    return value if isinstance(value, str) else json.dumps(value)


def _value(path: Path, row: Row, column: str) -> Any:
    if column not in row.values:
        raise bad_line(path, row.line, f"no column {column!r}; it has {', '.join(map(str, row.values))}")
    return row.values[column]
