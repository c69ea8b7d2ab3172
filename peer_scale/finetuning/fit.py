"""One fine-tuning: a model, its training examples, a seed and a learning rate give predictions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from peer_scale.errors import UserError
from peer_scale.finetuning.encoding import EncodedExamples, Padded
from peer_scale.finetuning.metrics import score
from peer_scale.finetuning.ranks import world_size
from peer_scale.finetuning.recipes import Recipe
from peer_scale.finetuning.tasks import Examples, Task
from peer_scale.finetuning.trainer import RecipeTrainer

_EVAL_BATCH = 64
Logits = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """Examples to predict, and the same as the model takes them."""

    examples: Examples
    encoded: EncodedExamples


@dataclass(frozen=True)
class Execution:
    """How the work is laid out; it changes nothing but the time that it takes.

    `micro_batch_size` None is the rank's share of the batch. `deepspeed` is the configuration for it, None: without.
    """

    micro_batch_size: int | None = None
    group_by_length: bool = False
    bf16: bool = False
    deepspeed: dict[str, Any] | None = None


@dataclass(frozen=True)
class Fitted:
    """What a run gives: the epoch whose weights count, outputs [N, C] by part, the training loss of each epoch."""

    best_epoch: int
    dev: Logits
    test: Logits
    train_losses: tuple[float, ...]


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    train: EncodedExamples,
    dev: dict[str, Part],
    test: dict[str, Part],
    *,
    lr: float,
    seed: int,
    pad_id: int,
    scratch: Path,
    execution: Execution,
) -> Fitted:
    """Train the model and predict; it is left with the weights of the epoch that counts.

    Raises:
        UserError: the batch cannot be shared among the ranks.
    """
    args = training_arguments(recipe, lr, seed, scratch, execution)
    trainer = RecipeTrainer(model, args, recipe=recipe, task=task, train_dataset=train, data_collator=Padded(pad_id))
    best = _BestEpoch(trainer, model, task, dev) if recipe.best_epoch else None
    if best is not None:
        trainer.add_callback(best)
    trainer.train()
    losses = tuple(record["loss"] for record in trainer.state.log_history if "loss" in record)
    if best is None:
        return Fitted(recipe.epochs, predict(trainer, dev), predict(trainer, test), losses)
    best.restore()
    return Fitted(best.epoch, best.logits, predict(trainer, test), losses)


def training_arguments(recipe: Recipe, lr: float, seed: int, scratch: Path, execution: Execution) -> TrainingArguments:
    """Tell the Trainer what is its own to do: nothing is evaluated, saved or reported that is not asked for."""
    use_cpu = not torch.cuda.is_available()
    micro, accumulation = share_of_batch(recipe.batch_size, world_size(), execution.micro_batch_size)
    args = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=_EVAL_BATCH,
        learning_rate=lr,
        max_grad_norm=recipe.clip_grad,
        seed=seed,
        data_seed=seed,
        bf16=execution.bf16,
        deepspeed=copy.deepcopy(execution.deepspeed),
        train_sampling_strategy="group_by_length" if execution.group_by_length else "random",
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=use_cpu,
        dataloader_pin_memory=not use_cpu,
    )
    args._n_gpu = min(1, args.n_gpu)  # one process has one GPU: several are for a launcher's ranks
    return args


def share_of_batch(batch_size: int, world_size: int, micro_batch_size: int | None) -> tuple[int, int]:
    """Give the examples that a rank takes at once and how often it does so per step."""
    share, rest = divmod(batch_size, world_size)
    if rest or not share:
        raise UserError(f"--batch-size {batch_size} cannot be shared among {world_size} ranks")
    micro = min(micro_batch_size or share, share)
    if share % micro:
        raise UserError(f"--micro-batch-size {micro} does not divide a rank's share of the batch, {share}")
    return micro, share // micro


def predict(trainer: RecipeTrainer, parts: dict[str, Part]) -> Logits:
    """Give the model's outputs [N, C] of each part, in the order of its examples."""
    found = {}
    for name, part in parts.items():
        in_order, numbers = part.encoded.by_length()
        outputs = trainer.predict(in_order).predictions
        logits = np.empty_like(outputs, dtype=np.float32)
        logits[numbers] = outputs
        found[name] = logits
    return found


def scores_of(task: Task, parts: dict[str, Part], logits: Logits) -> dict[str, float]:
    """Score the outputs; of several parts the task's metric is the mean, and each part's is there by its name."""
    by_part = {}
    for name, part in parts.items():
        if part.examples.labels is not None:
            by_part[name] = score(task, logits[name], part.examples.labels)
    if len(by_part) == 1:
        return next(iter(by_part.values()))
    mean = float(np.mean([found[task.metric] for found in by_part.values()]))
    named = {f"{key}_{name}": value for name, found in by_part.items() for key, value in found.items()}
    return {task.metric: mean, **named}


class _BestEpoch(TrainerCallback):
    """Keeps the weights of the epoch with the best dev score in memory; of equal ones the first."""

    def __init__(self, trainer: RecipeTrainer, model: nn.Module, task: Task, dev: dict[str, Part]) -> None:
        self._trainer, self._model, self._task, self._dev = trainer, model, task, dev
        self._score = float("-inf")
        self._weights: dict[str, Tensor] = {}
        self.epoch = 0
        self.logits: Logits = {}

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        logits = predict(self._trainer, self._dev)
        found = scores_of(self._task, self._dev, logits)[self._task.metric]
        if found > self._score:
            self._score, self.epoch, self.logits = found, round(state.epoch), logits
            weights = self._model.state_dict()
            self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    def restore(self) -> None:
        self._model.load_state_dict(self._weights)
