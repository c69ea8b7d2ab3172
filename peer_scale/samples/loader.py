"""Micro-batches for one data-parallel rank, from any global sample number on."""

import multiprocessing
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from peer_scale.samples.examples import Batch, ExampleBuilder, collate
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


class ExampleDataset(Dataset):
    """Sample number -> example."""

    def __init__(self, windows: Windows, builder: ExampleBuilder) -> None:
        assert len(windows) > 0, "no text to make samples of"
        self._windows, self._builder = windows, builder
        self._order = SeededOrder(len(windows), builder.seed)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, sample: int) -> tuple:
        return self._builder.build(self._windows.tokens(self._order[sample]), sample)


class _MicroBatchSampler(Sampler[list[int]]):
    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self._plan, self._steps = plan, range(first_step, last_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            for micro in range(self._plan.num_micro_batches):
                yield list(self._plan.samples(step, micro))


def micro_batches(
    dataset: ExampleDataset, plan: BatchPlan, *, first_step: int, last_step: int, num_workers: int
) -> Generator[list[Batch], None, None]:
    """For each step in [first_step, last_step), counted from 0: this rank's micro-batches of it."""
    loader = DataLoader(
        dataset,
        batch_sampler=_MicroBatchSampler(plan, first_step, last_step),
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_rank,
    )
    batches = iter(loader)
    for _ in range(first_step, last_step):
        yield [next(batches) for _ in range(plan.num_micro_batches)]


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
