"""GLUE's tasks from the files of its own layout: GLUE_DIR/CoLA/train.tsv, GLUE_DIR/MNLI/dev_matched.tsv and so on.

The files have quotes without a partner, so quotes are text; columns are found by the header's names. CoLA's train and
dev files have no header. QQP has lines that are cut short, which are passed over and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from peer_scale.errors import UserError
from peer_scale.finetuning.lines import bad_line, number_in, tab_separated
from peer_scale.finetuning.tasks import GLUE, Examples, GlueTask, TaskData, dev_parts

_COLA_COLUMNS = ("source", "label", "star", "sentence")
_DIAGNOSTICS = ("MNLI/diagnostic.tsv", "diagnostic/diagnostic.tsv", "AX/diagnostic.tsv")


def read_glue(root: Path, name: str) -> TaskData:
    """Read a task's train, dev and test files below `root`; the test files may be left out.

    Raises:
        UserError: a file is missing or a line is not what it must be; the message names both.
    """
    glue = GLUE[name]
    folder = root / glue.folder
    if not folder.is_dir():
        raise UserError(f"--data-dir {root}: has no folder {glue.folder} with GLUE's train.tsv, dev.tsv and test.tsv")
    notes: list[str] = []
    train = _read(folder / "train.tsv", glue, notes)
    dev = {part: _read(folder / f"{part}.tsv", glue, notes) for part in dev_parts(name)}
    tests = {part: folder / f"{part}.tsv" for part in glue.server_files}
    if "ax" in tests:
        tests["ax"] = next((root / path for path in _DIAGNOSTICS if (root / path).is_file()), tests["ax"])
    test = {part: _read(path, glue, notes, is_test=True) for part, path in tests.items() if path.is_file()}
    notes += size_notes(glue, train, dev)
    return TaskData(glue.task, train, dev, test, tuple(notes))


def size_notes(glue: GlueTask, train: Examples, dev: dict[str, Examples]) -> list[str]:
    """Say which parts have not as many examples as GLUE's."""
    parts = {"train": len(train), **{part: len(examples) for part, examples in dev.items()}}
    return [
        f"{glue.folder}: {part} has {found:,} examples, GLUE's has {known:,}"
        for (part, found), known in zip(parts.items(), glue.sizes, strict=True)
        if found != known
    ]


def _read(path: Path, glue: GlueTask, notes: list[str], *, is_test: bool = False) -> Examples:
    task = glue.task
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    ids = {written: number for number, written in enumerate(glue.written_labels)}
    rows = tab_separated(path)
    columns = list(_COLA_COLUMNS) if glue.folder == "CoLA" and not is_test else _header(path, rows)
    wanted = [*task.columns, *(() if is_test else (task.label,))]
    for column in wanted:
        if column not in columns:
            raise bad_line(path, 1, f"the header has no column {column!r}; it has {', '.join(columns)}")
    places = [columns.index(column) for column in wanted]
    skipped = []
    for number, fields in rows:
        if len(fields) <= max(places):
            if glue.folder == "QQP" and not is_test:
                skipped.append(number)
                continue
            raise bad_line(path, number, f"{len(fields)} columns, but {wanted[-1]!r} is number {max(places) + 1}")
        values = [fields[place] for place in places]
        texts.append(tuple(values[: len(task.columns)]))
        if is_test:
            continue
        written = values[-1]
        if task.is_regression:
            labels.append(number_in(written, path, number))
        elif written in ids:
            labels.append(ids[written])
        else:
            raise bad_line(path, number, f"the label is {written!r}; it must be one of {', '.join(ids)}")
    if not texts:
        raise UserError(f"{path}: holds no examples")
    if skipped:
        notes.append(f"{path}: {len(skipped)} lines with too few columns were passed over, the first is {skipped[0]}")
    if is_test:
        return Examples(texts, None)
    return Examples(texts, np.array(labels, np.float32 if task.is_regression else np.int64))


def _header(path: Path, rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: empty; GLUE's file begins with a header")
    return [name.strip() for name in first[1]]
