"""transformers' Trainer with a recipe: its loss, optimizer and schedule."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from peer_scale.finetuning.layerwise import parameter_groups
from peer_scale.finetuning.optimizer import UncorrectedAdam
from peer_scale.finetuning.recipes import Recipe, rate_factor
from peer_scale.finetuning.tasks import Task


class RecipeTrainer(Trainer):
    """Trains as a recipe says.

    The loss is the sum of the examples' losses, over the whole batch of all ranks and accumulation steps, or their
    mean: the models' own loss broadcasts [B, 1] against [B] where it is told so, and is not scaled for accumulation.
    """

    def __init__(self, model: nn.Module, args: TrainingArguments, *, recipe: Recipe, task: Task, **more: Any) -> None:
        super().__init__(model, args, **more)
        self._recipe, self._task = recipe, task
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the number of examples is counted over ranks and accumulation
        self.loss_is_scaled_for_ga = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Give a share of the loss: the mean over ranks, summed over accumulation steps, is the recipe's."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = summed_loss(self._task, outputs.logits, labels)
        if not self._recipe.sums_loss:
            loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        """Predict in the order of the examples: the Trainer would group these by length too, and shuffle the groups."""
        strategy, self.args.train_sampling_strategy = self.args.train_sampling_strategy, "random"
        try:
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: the Trainer counts all parameters in every step, which takes longer than a small model."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make Adam over groups of parameters with their own rates."""
        if self.optimizer is None:
            model = self.model if model is None else model
            assert model is not None
            recipe, lr = self._recipe, self.args.learning_rate
            groups = parameter_groups(model, recipe, lr, set(self.get_decay_parameter_names(model)))
            settings: dict[str, Any] = {
                "lr": lr,
                "betas": (recipe.adam_beta1, recipe.adam_beta2),
                "eps": recipe.adam_eps,
                "weight_decay": 0.0,
            }
            adam: Any = torch.optim.AdamW if recipe.has_bias_correction else UncorrectedAdam
            self.optimizer = adam(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Make the recipe's schedule."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            assert optimizer is not None
            self.lr_scheduler = LambdaLR(optimizer, rate_factor(self._recipe, num_training_steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler


def summed_loss(task: Task, logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the losses: cross entropy of logits [B, C] with ids [B], or squared error of [B, 1] with numbers [B]."""
    assert logits.shape == (len(labels), task.num_outputs), f"logits {list(logits.shape)}, labels {list(labels.shape)}"
    if task.is_regression:
        return F.mse_loss(logits[:, 0].float(), labels.float(), reduction="sum")
    return F.cross_entropy(logits.float(), labels, reduction="sum")
