"""Micro-batches for one data-parallel rank, from any global sample number on."""

import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from peer_scale.errors import UserError
from peer_scale.samples.examples import Batch, Example, ExampleBuilder, collate
from peer_scale.samples.windows import SeededOrder, Windows


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step are dealt out: data-parallel ranks take turns, one micro-batch each.

    Step t (from 0) consists of samples [t * global_batch, (t + 1) * global_batch), however many ranks share them.
    """

    micro_batch: int
    global_batch: int
    data_parallel_rank: int = 0
    data_parallel_size: int = 1

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches a rank works through in one step."""
        return self.global_batch // (self.micro_batch * self.data_parallel_size)

    def samples(self, step: int, micro: int) -> range:
        """Sample numbers of micro-batch `micro` of this rank in `step`."""
        turn = micro * self.data_parallel_size + self.data_parallel_rank
        first = step * self.global_batch + turn * self.micro_batch
        return range(first, first + self.micro_batch)


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
        tokens = self.windows.tokens(self._order[sample], self.builder.tokenizer.vocab_size)
        return self.builder.build(tokens, sample)


class _Samples(Dataset):
    """Sample number -> example and None, or a stand-in and what is wrong with the sample.

    A rank or a worker process that raised would leave the ranks that have no bad sample waiting for it.
    """

    def __init__(self, dataset: ExampleDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, sample: int) -> tuple[Example, Fault | None]:
        try:
            return self._dataset[sample], None
        except UserError as error:
            return self._dataset.builder.stand_in(sample), Fault(sample, str(error))


def _collate(samples: list[tuple[Example, Fault | None]]) -> tuple[Batch, Fault | None]:
    examples, faults = zip(*samples, strict=True)
    return collate(examples), _first(faults)


def _first(faults: Iterable[Fault | None]) -> Fault | None:
    return min((fault for fault in faults if fault is not None), default=None)


class _MicroBatchSampler(Sampler[list[int]]):
    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self._plan, self._steps = plan, range(first_step, last_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for micro in range(self._plan.num_micro_batches):
                yield list(self._plan.samples(step, micro))


def micro_batches(
    dataset: ExampleDataset, plan: BatchPlan, *, first_step: int, last_step: int, num_workers: int
) -> Iterator[StepBatches]:
    """Give this rank's micro-batches of each step in [first_step, last_step), counted from 0."""
    loader = DataLoader(
        _Samples(dataset),
        batch_sampler=_MicroBatchSampler(plan, first_step, last_step),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_rank,
    )
    batches = iter(loader)
    for _ in range(first_step, last_step):
        found = [next(batches) for _ in range(plan.num_micro_batches)]
        yield StepBatches([batch for batch, _ in found], _first(fault for _, fault in found))


def _leave_signals_to_the_rank(_: int) -> None:
    """Keep a worker alive where a signal goes to all processes: the rank still needs its batches to stop orderly.

    A rank that ends kills its workers (`end_workers`), since Python would ask them by SIGTERM and wait.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the workers that are left when the rank ends by an exception; to be registered with `atexit`."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
    for worker in multiprocessing.active_children():
        worker.kill()
