"""The README.md of a fine-tuned model, with the scores of all runs."""

from __future__ import annotations

from dataclasses import asdict

from peer_scale.finetuning.recipes import Recipe
from peer_scale.finetuning.results import TaskResult
from peer_scale.finetuning.tasks import Task


def task_card(model: str, task: Task, recipe: Recipe, result: TaskResult) -> str:
    """Write Markdown with the front matter that model hubs read; the licence is the publisher's to choose."""
    told = result.to_json()
    best = max(result.counted, key=lambda run: run.dev)
    runs = "\n".join(
        f"| {run.seed} | {run.lr:g} | {run.best_epoch} | {run.dev:.4f} | "
        f"{'' if run.test is None else f'{run.test:.4f}'} | {'failed' if run.failed else ''} |"
        for run in result.runs
    )
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items())
    labels = ", ".join(task.labels) or "a number"
    return f"""---
library_name: transformers
pipeline_tag: text-classification
---

# {model}, fine-tuned on {task.name}

Gives {labels} for {"a pair of texts" if len(task.columns) == 2 else "a text"}. The weights are those of the run with
seed {best.seed} and learning rate {best.lr:g}, the best on dev.

```python
from transformers import pipeline

classify = pipeline("text-classification", "THIS_FOLDER")
```

## Scores

{task.metric} of {told["n"]} runs with learning rate {result.lr:g} on {result.scored_on}: mean {told["mean"]:.4f},
standard deviation {told["std"]:.4f}, median {told["median"]:.4f}, max {told["max"]:.4f}; {told["failed"]} of
{told["n"]} failed, that is, were not better than predictions that are all the same. Trained on
{result.train_size:,} examples.

| seed | learning rate | epoch | dev | test | |
|---|---|---|---|---|---|
{runs}

The dev score chose the epoch, where the recipe does so, the learning rate and the run: it is somewhat too good.

## Recipe

| | |
|---|---|
{settings}

## Licence

None is given here: choose one before publishing, with the terms of the training text in mind.
"""
