"""Micro-batches for one data-parallel rank, from any global sample number on."""

import itertools
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from peer_scale.errors import UserError
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS, Batch, Example, ExampleBuilder, collate
from peer_scale.samples.shares import BatchPlan
from peer_scale.samples.windows import SeededOrder, Windows

_Sample: TypeAlias = tuple[int, int]
"""A sample's number and the window that it is made of."""


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


class _Shares(Dataset):
    """Step -> the samples of each of this rank's micro-batches."""

    def __init__(self, dataset: ExampleDataset, plan: BatchPlan) -> None:
        self._dataset, self._plan = dataset, plan

    def __getitem__(self, step: int) -> list[list[_Sample]]:
        samples = np.array(self._plan.samples(step))
        windows, lengths = self._dataset.measure(samples)
        shares = self._plan.micro_batches(lengths)
        return [list(zip(samples[share].tolist(), windows[share].tolist(), strict=True)) for share in shares]


class _Examples(Dataset):
    """Sample -> example and None, or a stand-in and what is wrong with the sample.

    A rank or a worker process that raised would leave the ranks that have no bad sample waiting for it.
    """

    def __init__(self, dataset: ExampleDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, sample: _Sample) -> tuple[Example, Fault | None]:
        number, window = sample
        try:
            return self._dataset.example(number, window), None
        except UserError as error:
            return self._dataset.builder.stand_in(number), Fault(number, str(error))


def _collate(samples: list[tuple[Example, Fault | None]]) -> tuple[Batch, Fault | None]:
    examples, faults = zip(*samples, strict=True)
    return collate(examples), _first(faults)


def _first(faults: Iterable[Fault | None]) -> Fault | None:
    return min((fault for fault in faults if fault is not None), default=None)


def _as_it_is(item: Any) -> Any:
    return item


def micro_batches(
    dataset: ExampleDataset, plan: BatchPlan, *, first_step: int, last_step: int, num_workers: int
) -> Iterator[StepBatches]:
    """Give this rank's micro-batches of each step in [first_step, last_step), counted from 0.

    Where worker processes make them, another one finds out ahead which samples they are: the training process only
    takes in their numbers.
    """
    shares = DataLoader(
        _Shares(dataset, plan),
        sampler=range(first_step, last_step),
        batch_size=None,
        num_workers=min(num_workers, 1),
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals_to_the_rank,
    )
    to_make, to_give = itertools.tee(shares)
    loader = DataLoader(
        _Examples(dataset),
        batch_sampler=itertools.chain.from_iterable(to_make),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_rank,
    )
    batches = iter(loader)
    for share in to_give:
        found = [next(batches) for _ in share]
        yield StepBatches([batch for batch, _ in found], _first(fault for _, fault in found))


def _leave_signals_to_the_rank(_: int) -> None:
    """Keep a worker alive where a signal goes to all processes: the rank still needs its batches to stop orderly.

    A rank that ends kills its workers (`end_workers`), since Python would ask them by SIGTERM and wait.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers that are left when the rank ends by an exception; to be registered with `atexit`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
    for worker in multiprocessing.active_children():
        worker.kill()
