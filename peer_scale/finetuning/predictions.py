"""Predictions of test sets: the files that GLUE's server takes, and the same for other tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peer_scale.finetuning.metrics import predicted
from peer_scale.finetuning.tasks import GLUE, Task
from peer_scale.storage import write_atomically


def write_predictions(
    folder: Path, task: Task, logits: dict[str, np.ndarray], label_range: tuple[float, float] | None
) -> None:
    """Write a file for each test part into `folder`: a header, then each example's number, from 0, and its prediction.

    GLUE's tasks have the server's names of files and labels; similarities are brought to 0 ... 5.
    """
    glue = GLUE.get(task.name)
    names = (glue.written_labels if glue is not None else ()) or task.labels
    low, high = label_range or (0.0, 1.0)
    for part, outputs in logits.items():
        predictions = predicted(task, outputs)
        if task.is_regression:
            values = predictions.astype(np.float64) * (high - low) + low
            if glue is not None and task.scale is not None:
                values = values.clip(*task.scale)
            written = [f"{value:.3f}" for value in values]
        else:
            written = [names[prediction] for prediction in predictions]
        lines = ["index\tprediction", *(f"{number}\t{one}" for number, one in enumerate(written))]
        folder.mkdir(parents=True, exist_ok=True)
        name = glue.server_files[part] if glue is not None else part
        write_atomically(folder / f"{name}.tsv", ("\n".join(lines) + "\n").encode())
