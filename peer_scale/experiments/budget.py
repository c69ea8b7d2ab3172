"""From FLOPs to optimizer steps: what a step costs in both accountings, decided before anything runs.

An arm whose steps are known beforehand gets its full warm-up and decay; one that is cut when its FLOPs are used up
does not, and is worse for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peer_scale.corpus.prepare import open_corpus
from peer_scale.errors import UserError
from peer_scale.experiments.config import BudgetConfig, ExperimentConfig, merged
from peer_scale.flops import actual_train_flops, paper_train_flops
from peer_scale.planning.lengths import Lengths
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS
from peer_scale.samples.split import split_text
from peer_scale.samples.windows import Windows
from peer_scale.settings.run import RunConfig


@dataclass(frozen=True)
class TextFacts:
    """What costs depend on in a run's text.

    Attributes:
        vocab_size: of the tokenizer; None: what the model's settings say.
        lengths: of the samples; None: all are full.
    """

    vocab_size: int | None = None
    lengths: Lengths | None = None


@dataclass(frozen=True)
class StepCosts:
    """One optimizer step of all ranks: real tokens on average, and FLOPs in both accountings."""

    tokens: float
    paper: float
    actual: float

    def of(self, accounting: str) -> float:
        """Give the FLOPs in one accounting."""
        return self.paper if accounting == "paper" else self.actual


@dataclass
class Texts:
    """Opens the text of runs, each once; raw text is tokenised into the cache on the way, before any run needs it."""

    _found: dict[tuple, TextFacts] = field(default_factory=dict)

    def facts(self, run: RunConfig) -> TextFacts:
        """Open the run's text; UserError for what cannot be used."""
        data, seq_length = run.data, run.training.seq_length
        key: tuple[Any, ...] = (data, run.model.vocab_size, seq_length)
        if key not in self._found:
            store, tokenizer = open_corpus(
                data.data_path,
                data.tokenizer,
                vocab_size=run.model.vocab_size,
                text_key=data.text_key,
                cache_dir=data.cache_dir,
                workers=len(os.sched_getaffinity(0)),
                show_progress=True,
            )
            trained, _ = split_text(store, data.validation_fraction, "tokens")
            windows = Windows(store, trained, width=seq_length - NUM_SPECIAL_TOKENS)
            self._found[key] = TextFacts(tokenizer.vocab_size, Lengths.of_text(windows))
        return self._found[key]


def missing_text(config: ExperimentConfig) -> str | None:
    """Name the first text or tokenizer of an arm that is not on this machine; None where all are."""
    for arm in config.all_arms:
        data = merged(config.common, arm.changes).get("data") or {}
        for value in (data.get("data_path"), data.get("tokenizer")):
            for path in value if isinstance(value, list) else [value]:
                if path not in (None, "builtin") and not (Path(path).exists() or Path(f"{path}.bin").exists()):
                    return str(path)
    return None


def step_costs(run: RunConfig, text: TextFacts) -> StepCosts:
    """Count what an optimizer step of a run costs on a text."""
    model = run.model if text.vocab_size is None else replace(run.model, vocab_size=text.vocab_size)
    training, samples = run.training, run.training.global_batch_size
    size = run.sample_size if text.lengths is None else text.lengths.mean_size(run.masking)
    return StepCosts(
        tokens=samples * size.tokens,
        paper=paper_train_flops(model, run.objective, seq_length=training.seq_length, samples=samples),
        actual=actual_train_flops(
            model, run.objective, size, samples=samples, activation_checkpointing=training.activation_checkpointing
        ),
    )


def steps_within(budget: BudgetConfig, costs: StepCosts) -> int:
    """Give the most steps that cost no more than the budget; UserError where it does not pay for one."""
    steps = int(budget.flops // costs.of(budget.accounting))
    if not steps:
        raise UserError(
            f"budget.flops {budget.flops:g} does not pay for one step, which costs "
            f"{costs.of(budget.accounting):.3g} FLOPs ({budget.accounting})"
        )
    return steps
