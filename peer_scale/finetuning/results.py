"""What came out of fine-tunings: runs, their sums, the files that hold them."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peer_scale.finetuning.disk_errors import naming_the_file
from peer_scale.storage import read_json_object, write_atomically

RESULTS = "results.json"


@dataclass(frozen=True)
class Run:
    """One fine-tuning: `dev` and `test` are the task's metric, the mean of its parts where there are several.

    A run has failed that is not better than predictions that are all the same; it counts like the others.
    """

    seed: int
    lr: float
    best_epoch: int
    dev: float
    test: float | None
    dev_metrics: dict[str, float]
    test_metrics: dict[str, float] | None
    failed: bool
    wall_s: float
    train_losses: tuple[float, ...]

    @property
    def key(self) -> str:
        """Its name among the runs of a task."""
        return run_key(self.seed, self.lr)


def run_key(seed: int, lr: float) -> str:
    """Name a run of a task."""
    return f"seed{seed}-lr{lr:g}"


@dataclass(frozen=True)
class TaskResult:
    """All runs of a task; those with the learning rate that is best on dev, by the mean, are what counts."""

    task: str
    metric: str
    train_size: int
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    @property
    def lr(self) -> float:
        """The learning rate with the best mean dev score; of equal ones the first."""
        lrs = list(dict.fromkeys(run.lr for run in self.runs))
        return max(lrs, key=lambda lr: statistics.fmean(run.dev for run in self.runs if run.lr == lr))

    @property
    def counted(self) -> list[Run]:
        """The runs of that learning rate."""
        return [run for run in self.runs if run.lr == self.lr]

    @property
    def scored_on(self) -> str:
        """Whose score counts: "test" where it has labels, else "dev", which the best was chosen by."""
        return "dev" if any(run.test is None for run in self.runs) else "test"

    @property
    def scores(self) -> list[float]:
        """The scores that count."""
        return [run.dev if run.test is None or self.scored_on == "dev" else run.test for run in self.counted]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def failed(self) -> int:
        """How many of the runs that count failed."""
        return sum(run.failed for run in self.counted)

    def to_json(self) -> dict[str, Any]:
        """Give all of it as a JSON object."""
        scores = self.scores
        return {
            "metric": self.metric,
            "higher_is_better": True,
            "train_size": self.train_size,
            "runs": [asdict(run) for run in self.runs],
            "lr": self.lr,
            "mean": self.mean,
            "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
            "median": statistics.median(scores),
            "max": max(scores),
            "n": len(scores),
            "failed": self.failed,
            "scored_on": self.scored_on,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Results:
    """The results of a model on its tasks, in their order."""

    model: str
    recipe: str
    tasks: dict[str, TaskResult]

    @property
    def average(self) -> float | None:
        """Plain mean over the tasks, as GLUE's average; None without a task."""
        means = [task.mean for task in self.tasks.values()]
        return statistics.fmean(means) if means else None

    def to_json(self) -> dict[str, Any]:
        """Give the content of results.json."""
        tasks = {name: task.to_json() for name, task in self.tasks.items()}
        return {"model": self.model, "recipe": self.recipe, "tasks": tasks, "average": self.average}

    def write(self, folder: Path) -> None:
        """Write results.json."""
        write_json(folder / RESULTS, self.to_json())


def read_run(path: Path) -> Run | None:
    """Read a run that is done; None where it is not."""
    told = read_json_object(path)
    try:
        return None if told is None else Run(**{**told, "train_losses": tuple(told["train_losses"])})
    except (TypeError, KeyError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small JSON file whole, or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with naming_the_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
