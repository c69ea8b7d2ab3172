"""Micro-batches for one data-parallel rank, from any global sample number on."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Generator
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from peer_scale.errors import UserError
from peer_scale.lifetime import end_with_parent
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS, Batch, Example, ExampleBuilder, collate
from peer_scale.samples.shares import BatchPlan
from peer_scale.samples.windows import SeededOrder, Windows

_STEPS_AHEAD: Final = 2
"""Of each worker process."""


class Fault(NamedTuple):
    """A sample that cannot be made, and the line that tells the user why; the smallest is a step's first."""

    sample: int
    message: str


class StepBatches(NamedTuple):
    """A rank's micro-batches of one step; `fault` is the first one among its samples, which stand-ins replace."""

    batches: list[Batch]
    fault: Fault | None = None


class ExampleDataset(Dataset):
    """Sample number -> example; UserError for a sample of damaged text.

    Attributes:
        windows: the text that the samples are made of.
        builder: makes a sample of its tokens.
    """

    def __init__(self, windows: Windows, builder: ExampleBuilder) -> None:
        assert len(windows) > 0, "no text to make samples of"
        self.windows, self.builder = windows, builder
        self._order = SeededOrder(len(windows), builder.seed)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, sample: int) -> Example:
        return self.example(sample, self._order[sample])

    def example(self, sample: int, window: int) -> Example:
        """Make a sample of its window's tokens."""
        return self.builder.build(self.windows.tokens(window, self.builder.tokenizer.vocab_size), sample)

    def token_counts(self, num_samples: int) -> np.ndarray:
        """Count the tokens in the text of the first samples, int64 [vocabulary]; UserError for damaged text."""
        vocab_size = self.builder.tokenizer.vocab_size
        windows = self._order.at(np.arange(min(num_samples, len(self))))
        tokens = [self.windows.tokens(window, vocab_size) for window in windows.tolist()]
        return np.bincount(np.concatenate(tokens), minlength=vocab_size)

    def measure(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the windows of any samples, and without reading them how many tokens the samples have at most."""
        windows = self._order.at(samples)
        return windows, self.windows.lengths(windows) + NUM_SPECIAL_TOKENS


class _Steps(Dataset):
    """Step -> this rank's micro-batches."""

    def __init__(self, dataset: ExampleDataset, plan: BatchPlan) -> None:
        self._dataset, self._plan = dataset, plan

    def __getitem__(self, step: int) -> StepBatches:
        samples = np.array(self._plan.samples(step))
        windows, lengths = self._dataset.measure(samples)
        batches, faults = [], []
        for share in self._plan.micro_batches(lengths):
            made = [self._example(*one) for one in zip(samples[share].tolist(), windows[share].tolist(), strict=True)]
            batches.append(collate([example for example, _ in made]))
            faults += [fault for _, fault in made if fault is not None]
        return StepBatches(batches, min(faults, default=None))

    def _example(self, sample: int, window: int) -> tuple[Example, Fault | None]:
        """Give the example and None, or a stand-in and what is wrong with the sample.

        A rank or a worker process that raised would leave the ranks that have no bad sample waiting for it.
        """
        try:
            return self._dataset.example(sample, window), None
        except UserError as error:
            return self._dataset.builder.stand_in(sample), Fault(sample, str(error))


def _as_it_is(item: Any) -> Any:
    return item


def micro_batches(
    dataset: ExampleDataset, plan: BatchPlan, *, first_step: int, last_step: int, num_workers: int
) -> Generator[StepBatches]:
    """Give this rank's micro-batches of each step in [first_step, last_step), counted from 0.

    A worker process makes a step at a time, and each is two steps ahead: the training process takes in all of a step's
    micro-batches before it begins. Workers are forks, which start in milliseconds, also where that is not Python's
    default (from 3.14 on): they compute with numpy alone.
    """
    loader = DataLoader(
        _Steps(dataset, plan),
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=_STEPS_AHEAD if num_workers else None,
        multiprocessing_context="fork" if num_workers else None,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=functools.partial(_live_with_the_rank, os.getpid()),
    )
    yield from loader


def _live_with_the_rank(rank: int, _: int) -> None:
    """Keep a worker alive where a signal goes to all processes: the rank still needs its batches to stop orderly.

    A rank that ends kills its workers (`end_workers`), since Python would ask them by SIGTERM and wait; Linux kills
    those of a rank that was killed itself, which would hold its port and its GPU.
    """
    end_with_parent(rank, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers that are left when the rank ends by an exception; to be registered with `atexit`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
    for worker in multiprocessing.active_children():
        worker.kill()
