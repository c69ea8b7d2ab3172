"""GLUE's tasks from the Hugging Face hub."""

from __future__ import annotations

from typing import Any

import numpy as np

from peer_scale.errors import UserError
from peer_scale.finetuning.glue_files import size_notes
from peer_scale.finetuning.tasks import GLUE, Examples, GlueTask, TaskData, dev_parts

DATASET, REVISION = "nyu-mll/glue", "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"


def load_glue(name: str, source: str = DATASET) -> TaskData:
    """Download a task, or take it from the cache; `source` may also be a folder that is laid out as the dataset.

    Raises:
        UserError: it can be had from neither.
    """
    glue = GLUE[name]
    splits = _load(source, name)
    train = _examples(splits["train"], glue)
    dev = {part: _examples(splits[part.replace("dev", "validation")], glue) for part in dev_parts(name)}
    tests = {part: splits[part] for part in glue.server_files if part in splits}
    if "ax" in glue.server_files:
        tests["ax"] = _load(source, "ax")["test"]
    test = {part: Examples(_examples(split, glue).texts, None) for part, split in tests.items()}
    return TaskData(glue.task, train, dev, test, tuple(size_notes(glue, train, dev)))


def _load(source: str, name: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source, name, revision=REVISION)
    except Exception as error:  # of many kinds, by what is wrong
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--task {name}: {source} cannot be loaded from the Hugging Face hub ({reason}); "
            "--data-dir takes the folder of GLUE's own files"
        ) from None


def _examples(split: Any, glue: GlueTask) -> Examples:
    texts = list(zip(*(split[column][:] for column in glue.hub_columns), strict=True))
    kind = np.float32 if glue.task.is_regression else np.int64
    return Examples(texts, np.array(split["label"][:], kind))
