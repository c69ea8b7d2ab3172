"""Fine-tune a model on tasks, several times each, and add up what comes out.

OUTPUT_DIR/results.json                     all results, renewed after each run
OUTPUT_DIR/converted/                       a checkpoint of ours as transformers opens it
OUTPUT_DIR/TASK/settings.json               what the runs there were told
OUTPUT_DIR/TASK/runs/seed1-lr0.0001.json    a run that is done: it is not done again
OUTPUT_DIR/TASK/model/                      the best run's model, with the scores in README.md
OUTPUT_DIR/TASK/predictions/                its predictions of the test set
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from peer_scale.errors import UserError
from peer_scale.finetuning.card import task_card
from peer_scale.finetuning.config import FinetuneConfig
from peer_scale.finetuning.data import digest_of, for_training, load_tasks, subset
from peer_scale.finetuning.disk_errors import naming_the_file
from peer_scale.finetuning.encoding import EncodedExamples, encode, inputs_of
from peer_scale.finetuning.fit import Execution, Fitted, Part, fit, scores_of
from peer_scale.finetuning.loading import Pretrained, build_classifier, classifier_config, find_model, open_pretrained
from peer_scale.finetuning.metrics import failed
from peer_scale.finetuning.predictions import write_predictions
from peer_scale.finetuning.ranks import is_first_rank, join, of_first_rank
from peer_scale.finetuning.recipes import Recipe, recipe_for
from peer_scale.finetuning.results import Results, Run, TaskResult, read_run, run_key, write_json
from peer_scale.finetuning.saving import for_transformers, save_model
from peer_scale.finetuning.tasks import GLUE, Examples, TaskData
from peer_scale.storage import read_json_object, require_writable_folder, write_atomically

__all__ = ["FinetuneConfig", "Results", "finetune"]

SETTINGS = "settings.json"
Tell = Callable[[str], None]


def finetune(config: FinetuneConfig, tell: Tell = lambda line: None) -> Results:
    """Fine-tune as the configuration says; runs that the output folder has already are taken from there.

    Args:
        config: what is done.
        tell: is given a line per run, by the first rank.

    Raises:
        UserError: the model, the data or the output folder is not what it must be.
    """
    disable_progress_bar()
    if config.deepspeed_config is not None and "RANK" not in os.environ:
        raise UserError("--deepspeed_config needs a launcher: torchrun or deepspeed")
    is_first = is_first_rank()
    if is_first:
        require_writable_folder(config.output_dir, "--output-dir")
    source = find_model(config.model, config.output_dir / "converted", branch=config.branch, writes=is_first)
    join()
    tasks = of_first_rank(lambda: load_tasks(config))
    pretrained = open_pretrained(source, config.model, random_init=config.random_init)
    results: dict[str, TaskResult] = {}
    for data in tasks:
        for note in data.notes if is_first else ():
            tell(f"note: {note}")

        def keep(result: TaskResult, name: str = data.task.name) -> None:
            results[name] = result
            if is_first:
                Results(config.model, config.recipe, results).write(config.output_dir)

        with naming_the_file():
            _Work.of(config, pretrained, data).run(tell if is_first else lambda line: None, keep)
    return Results(config.model, config.recipe, results)


@dataclass(frozen=True)
class _Work:
    """The runs of one task."""

    config: FinetuneConfig
    pretrained: Pretrained
    data: TaskData
    recipe: Recipe
    seeds: tuple[int, ...]
    train: EncodedExamples
    dev: dict[str, Part]
    test: dict[str, Part]

    @staticmethod
    def of(config: FinetuneConfig, pretrained: Pretrained, data: TaskData) -> _Work:
        """Encode the examples as the model and the recipe want them."""
        name = data.task.name
        size = GLUE[name].sizes[0] if name in GLUE else len(data.train)
        hidden_size = pretrained.config.hidden_size
        recipe = config.applied_to(recipe_for(config.recipe, hidden_size=hidden_size, task=name, train_size=size))
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(classifier_config(pretrained, data.task, recipe))
        wanted = inputs_of(model)
        max_length = pretrained.max_length(config.max_length)

        def encoded(examples: Examples) -> EncodedExamples:
            return encode(examples, pretrained.tokenizer, wanted, max_length, pops_longer=recipe.pops_longer)

        def parts(named: dict[str, Examples]) -> dict[str, Part]:
            return {part: Part(examples, encoded(examples)) for part, examples in named.items()}

        train = for_training(data, both_orders=recipe.uses_both_orders, scales_labels=recipe.scales_labels)
        seeds = config.seeds or tuple(range(1, recipe.num_seeds + 1))
        return _Work(config, pretrained, data, recipe, seeds, encoded(train), parts(data.dev), parts(data.test))

    @property
    def folder(self) -> Path:
        """Where the task's files go."""
        return self.config.output_dir / self.data.task.name

    @property
    def label_range(self) -> tuple[float, float] | None:
        """What 0 and 1 stand for in training; None where labels are as they are."""
        task = self.data.task
        return task.scale if task.is_regression and self.recipe.scales_labels else None

    def run(self, tell: Tell, keep: Callable[[TaskResult], None]) -> None:
        """Do the runs that are not done; `keep` is given the result so far after each."""
        if is_first_rank():
            self._check_settings()
        runs: list[Run] = []
        for lr in self.recipe.lrs:
            for seed in self.seeds:
                path = self.folder / "runs" / f"{run_key(seed, lr)}.json"
                run = of_first_rank(lambda path=path: read_run(path))  # type: ignore[misc]
                is_old = run is not None
                if run is None:
                    best = max((one.dev for one in runs), default=float("-inf"))
                    run = self._fine_tune(lr, seed, best)
                    if is_first_rank():
                        write_json(path, asdict(run))
                runs.append(run)
                tell(self._line(run, is_old=is_old))
                keep(self._result(runs))
        if is_first_rank() and self.config.save_model and (self.folder / "model").is_dir():
            path = self.folder / "model" / "README.md"
            with naming_the_file(path):
                write_atomically(path, self._card(runs).encode())

    def _fine_tune(self, lr: float, seed: int, best: float) -> Run:
        begin = time.monotonic()
        task, recipe, config = self.data.task, self.recipe, self.config
        model = build_classifier(self.pretrained, task, recipe, seed)
        numbers = subset(len(self.train), config.max_train_examples, seed)
        fitted = fit(
            model,
            task,
            recipe,
            self.train.take(numbers) if len(numbers) < len(self.train) else self.train,
            self.dev,
            self.test,
            lr=lr,
            seed=seed,
            pad_id=self.pretrained.tokenizer.pad_token_id or 0,
            scratch=self.folder / "runs",
            execution=self._execution(),
        )
        run = self._scored(fitted, lr, seed, time.monotonic() - begin)
        if is_first_rank() and run.dev > best:
            self._save(model, fitted, run)
        return run

    def _execution(self) -> Execution:
        config = self.config
        deepspeed = None
        if config.deepspeed_config is not None:
            from peer_scale.finetuning.deepspeed_settings import deepspeed_settings
            from peer_scale.training.engine import leave_out_shared_memory_op

            leave_out_shared_memory_op()
            deepspeed = deepspeed_settings(config.deepspeed_config)
        return Execution(config.micro_batch_size, config.group_by_length, config.bf16, deepspeed)

    def _scored(self, fitted: Fitted, lr: float, seed: int, seconds: float) -> Run:
        task = self.data.task
        dev = scores_of(task, self.dev, fitted.dev)
        is_tested = any(part.examples.labels is not None for part in self.test.values())
        test = scores_of(task, self.test, fitted.test) if is_tested else None
        return Run(
            seed=seed,
            lr=lr,
            best_epoch=fitted.best_epoch,
            dev=dev[task.metric],
            test=None if test is None else test[task.metric],
            dev_metrics=dev,
            test_metrics=test,
            failed=any(failed(task, fitted.dev[name], part.examples.known_labels) for name, part in self.dev.items()),
            wall_s=round(seconds, 3),
            train_losses=fitted.train_losses,
        )

    def _save(self, model: Any, fitted: Fitted, run: Run) -> None:
        predictions, folder = self.folder / "predictions", self.folder / "model"
        with naming_the_file(predictions):
            write_predictions(predictions, self.data.task, fitted.test, self.label_range)
        if self.config.save_model:
            plain = for_transformers(model, self.data.task, self.label_range)
            with naming_the_file(folder):
                save_model(plain, self.pretrained.tokenizer, self._card([run]), folder)

    def _card(self, runs: list[Run]) -> str:
        return task_card(self.config.model, self.data.task, self.recipe, self._result(runs))

    def _result(self, runs: list[Run]) -> TaskResult:
        task = self.data.task
        size = len(subset(len(self.data.train), self.config.max_train_examples, 0))
        return TaskResult(task.name, task.metric, size, tuple(runs), self.data.notes)

    def _check_settings(self) -> None:
        """Refuse to add runs to those of other settings; what may differ is the number of runs and the layout."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name not in ("lrs", "num_seeds")}
        config = self.config
        asked: dict[str, Any] = {
            "model": self.pretrained.digest,
            "data": digest_of(self.data),
            "random_init": config.random_init,
            "max_length": self.pretrained.max_length(config.max_length),
            "max_train_examples": config.max_train_examples,
            "group_by_length": config.group_by_length,
            "bf16": config.bf16,
            **recipe,
        }
        path = self.folder / SETTINGS
        found = read_json_object(path)
        for key, value in asked.items():
            if found is not None and found.get(key) != value:
                raise UserError(
                    f"--output-dir {config.output_dir}: the runs of {self.data.task.name} there were made with {key} "
                    f"{found.get(key)}, now it is {value}; give another folder"
                )
        if found is None:
            write_json(path, asked)

    def _line(self, run: Run, *, is_old: bool) -> str:
        metric, recipe = self.data.task.metric, self.recipe
        test = "" if run.test is None else f"  test {run.test:.4f}"
        ending = "kept from before" if is_old else f"{run.wall_s:.1f} s"
        fate = "  FAILED: no better than a constant" if run.failed else ""
        return (
            f"{self.data.task.name}  seed {run.seed}  lr {run.lr:g}  epoch {run.best_epoch}/{recipe.epochs}  "
            f"{metric} dev {run.dev:.4f}{test}{fate}  ({ending})"
        )
