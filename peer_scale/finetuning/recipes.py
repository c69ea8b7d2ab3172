"""How a model is fine-tuned: the two recipes that the literature's numbers were made with.

`paper` is Table 9 of the PEER paper on transformers' classes; `electra` is what google-research's code does for
ELECTRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

RecipeName = Literal["paper", "electra"]
Head = Literal["transformers", "linear"]
Layerwise = Literal["none", "official", "fixed"]

_SMALL_TASK, _LARGE_TASK = 10_000, 200_000
_BASE, _LARGE = 768, 1024


@dataclass(frozen=True)
class Recipe:
    """Every choice of a fine-tuning.

    head: "transformers": dropout, dense, GELU, dropout, linear (of BERT and others: what theirs is); "linear": dropout,
        linear, on the state of the first token.
    sums_loss: the loss is summed over the batch, not averaged; clipping then nearly always normalises the gradient.
    has_bias_correction: Adam corrects its means for having begun at 0.
    decays_from_start: the rate falls linearly to 0 from the first step on, during the warm-up too, whose peak is then
        (1 - warmup) lr; otherwise it falls from the end of the warm-up on.
    pops_longer: of a pair that is too long a token at a time goes from the end of the longer text, the second where
        both are as long; otherwise the tokenizer's "longest_first".
    uses_both_orders: pairs that have no order (MRPC, STS-B) are trained on in both.
    scales_labels: numbers to be told are brought to 0 ... 1 for training.
    best_epoch: the dev score of the best epoch counts, not that of the last.
    """

    name: RecipeName
    head: Head
    sums_loss: bool
    has_bias_correction: bool
    decays_from_start: bool
    pops_longer: bool
    uses_both_orders: bool
    scales_labels: bool
    weight_decay: float
    layerwise: Layerwise
    layerwise_decay: float
    lrs: tuple[float, ...]
    epochs: int
    best_epoch: bool
    num_seeds: int
    batch_size: int = 32
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-6
    warmup: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    clip_grad: float = 1.0


def recipe_for(name: RecipeName, *, hidden_size: int, task: str, train_size: int) -> Recipe:
    """Give a recipe's values for a model's size and a task.

    GLUE's eight tasks get what the tables name for them; the limits by which other tasks' numbers of examples choose
    among these are such that GLUE's would choose the same.
    """
    if name == "paper":
        is_small = train_size < _SMALL_TASK
        return Recipe(
            *("paper", "transformers"),
            sums_loss=False,
            has_bias_correction=True,
            decays_from_start=False,
            pops_longer=False,
            uses_both_orders=False,
            scales_labels=False,
            weight_decay=0.0,
            layerwise="none",
            layerwise_decay=layerwise_decay(hidden_size),
            lrs=(5e-5, 3e-5) if hidden_size >= _BASE else (1e-4, 7.5e-5),
            epochs=20 if is_small else 4,
            best_epoch=is_small,
            num_seeds=5 if is_small else 3 if train_size < _LARGE_TASK else 1,
        )
    return Recipe(
        *("electra", "linear"),
        sums_loss=True,
        has_bias_correction=False,
        decays_from_start=True,
        pops_longer=True,
        uses_both_orders=True,
        scales_labels=True,
        weight_decay=0.01,
        layerwise="official",
        layerwise_decay=layerwise_decay(hidden_size),
        lrs=(5e-5 if hidden_size >= _LARGE else 1e-4 if hidden_size >= _BASE else 3e-4,),
        epochs=10 if task in ("rte", "stsb") else 3,
        best_epoch=False,
        num_seeds=10,
    )


def layerwise_decay(hidden_size: int) -> float:
    """Give ELECTRA's decay of the rate from layer to layer."""
    return 0.9 if hidden_size >= _LARGE else 0.8


def rate_factor(recipe: Recipe, num_steps: int) -> Callable[[int], float]:
    """Give the schedule: the factor of the learning rate in step 0, 1, ... of `num_steps`; it is 0 in the first."""
    warmup = recipe.warmup * num_steps if recipe.decays_from_start else math.ceil(recipe.warmup * num_steps)

    def electra(step: int) -> float:
        return (1 - min(step, num_steps) / num_steps) * (min(1.0, step / warmup) if warmup else 1.0)

    def linear(step: int) -> float:
        if step < warmup:
            return step / warmup
        return max(0.0, (num_steps - step) / max(1, num_steps - warmup))

    return electra if recipe.decays_from_start else linear
