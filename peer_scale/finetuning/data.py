"""The examples of the tasks that a user names, wherever they come from."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

from peer_scale.errors import UserError
from peer_scale.finetuning.config import FinetuneConfig
from peer_scale.finetuning.glue_files import read_glue
from peer_scale.finetuning.glue_hub import load_glue
from peer_scale.finetuning.own_files import TASK_FILE, read_files, read_task_folder, task_of_files
from peer_scale.finetuning.tasks import GLUE, Examples, TaskData

ALL_OF_GLUE = "glue"


def load_task(name: str, data_dir: Path | None) -> TaskData:
    """Load a task of GLUE, or the one whose folder `name` is.

    Raises:
        UserError: it is neither, or its files are not what they must be.
    """
    if name in GLUE:
        return load_glue(name) if data_dir is None else read_glue(data_dir, name)
    folder = Path(name)
    if (folder / TASK_FILE).is_file():
        return read_task_folder(folder)
    raise UserError(f"--task {name}: neither a folder with {TASK_FILE} nor one of {', '.join(GLUE)}")


def load_tasks(config: FinetuneConfig) -> list[TaskData]:
    """Load all that the configuration names.

    Raises:
        UserError: as `load_task` does, or two tasks have one name.
    """
    if config.train_file is not None:
        task = task_of_files(
            config.train_file, config.text_columns, config.label_column, config.kind, config.metric, config.task_name
        )
        return [read_files(task, config.train_file, config.dev_file, config.test_file)]
    names = [one for name in config.tasks for one in (GLUE if name == ALL_OF_GLUE else (name,))]
    found = [load_task(name, config.data_dir) for name in names]
    for data in found:
        if [other.task.name for other in found].count(data.task.name) > 1:
            raise UserError(f"--task: two tasks are called {data.task.name}")
    return found


def digest_of(data: TaskData) -> str:
    """Give what tells the examples from others."""
    digest = hashlib.sha256()
    for examples in (data.train, *data.dev.values(), *data.test.values()):
        for text in examples.texts:
            digest.update("\t".join(text).encode("utf-8", "surrogatepass") + b"\n")
        if examples.labels is not None:
            digest.update(examples.labels.tobytes())
    return digest.hexdigest()[:16]


def for_training(data: TaskData, *, both_orders: bool, scales_labels: bool) -> Examples:
    """Give the training examples as a recipe wants them."""
    train, task = data.train, data.task
    if scales_labels and task.scale is not None and train.labels is not None:
        low, high = task.scale
        train = replace(train, labels=(train.labels - low) / (high - low))
    glue = GLUE.get(task.name)
    if both_orders and glue is not None and glue.has_pairs_in_no_order:
        numbers = list(range(len(train))) * 2
        turned = [(second, first) for first, second in train.texts]
        return replace(train.take(numbers), texts=[*train.texts, *turned])
    return train


def subset(count: int, asked: int | None, seed: int) -> list[int]:
    """Draw the numbers of `asked` of `count` examples by a seed; None, or too many, are all."""
    if asked is None or asked >= count:
        return list(range(count))
    return random.Random(seed).sample(range(count), asked)
