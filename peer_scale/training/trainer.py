"""The training loop, and what can be hung onto it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from peer_scale.checkpoints.progress import Progress
from peer_scale.errors import TrainingError, UserError
from peer_scale.objectives.engine import Engine
from peer_scale.objectives.works import GlobalCounts, StepInfo
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.parallel.topology import Topology
from peer_scale.samples.examples import Batch
from peer_scale.samples.loader import Fault, StepBatches
from peer_scale.seeds import stream_seed
from peer_scale.settings.run import RunConfig
from peer_scale.training.engine import gradient_norm, loss_scale
from peer_scale.training.late_numbers import LateNumbers
from peer_scale.training.metering import Meter, StepRecord
from peer_scale.training.optimizer import set_hyperparameters
from peer_scale.training.runner import Runner
from peer_scale.training.step_clock import StepClock
from peer_scale.training.time_spent import Part, TimeSpent


class Callback:
    """Does nothing; subclasses override what they need. All ranks call the same methods in the same order.

    `part` is what the time is spent on that a callback takes at the end of a step and of the run.
    """

    part: Part = "train"

    def on_step_begin(self, trainer: Trainer, step: int) -> None:
        """A step is about to be launched."""

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        """A step has been launched; `record.extra` takes further metrics for its line of metrics.jsonl."""

    def on_step_known(self, trainer: Trainer, record: StepRecord, metrics: dict[str, Any]) -> None:
        """A step's numbers have been read back (at most one step late); TrainingError or WentBack keep them back."""

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        """All know the step: its metrics are to be passed on."""

    def on_went_back(self, step: int) -> None:
        """The state is again that after an earlier step, from which training goes on."""

    def on_failure(self) -> None:
        """Training is about to end, on all ranks alike, by a UserError or TrainingError."""

    def on_train_end(self, trainer: Trainer) -> None:
        """The last step is done and reported."""


class WentBack(Exception):
    """An earlier state has been put in place, on all ranks alike; `progress` is what had been done then."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress


class Trainer:
    """Runs optimizer steps and tells the callbacks; everything optional is one of them.

    `wants_stop` is set by callbacks and takes effect together on all ranks, since it travels with the step's sums. So
    does what a rank finds wrong with its samples: all ranks end by the same UserError before anything of the step is
    reported or saved.
    """

    def __init__(
        self,
        run: RunConfig,
        topology: Topology,
        coordinator: RankCoordinator,
        engine: Engine,
        runner: Runner,
        meter: Meter,
        callbacks: Sequence[Callback],
        *,
        progress: Progress,
        warmup_steps: int,
        spent: TimeSpent | None = None,
    ) -> None:
        self.run, self.topology, self.engine, self.runner, self.meter = run, topology, engine, runner, meter
        self._coordinator = coordinator
        self.callbacks = callbacks
        self.progress = progress
        self.warmup_steps = warmup_steps
        self.wants_stop = False
        self.stopping = False
        self.spent = spent or TimeSpent()
        self._own_time = StepClock(topology.device)
        self._pending: deque[StepRecord] = deque()
        # where Adam does not correct for its beginning it is told before each step how many updates there have been
        counts_updates = run.training.may_skip_updates and not run.training.adam_bias_correction
        self._unread = 0 if counts_updates else 1

    def fit(self, steps_after: Callable[[int], Generator[StepBatches]]) -> None:
        """Train from the step after `progress.step` to the last.

        `steps_after(n)` gives this rank's micro-batches of the steps after step n.
        """
        self._own_time.watch_forward(self.engine.module)
        self.spent.switch("train")
        try:
            while not self._reaches_the_end(steps_after):
                pass
        except (UserError, TrainingError):
            for callback in self.callbacks:
                callback.on_failure()
            raise
        for callback in self.callbacks:
            with self._time_of(callback):
                callback.on_train_end(self)

    def _reaches_the_end(self, steps_after: Callable[[int], Generator[StepBatches]]) -> bool:
        """Train on from `progress.step`; False where that has been set back on the way."""
        try:
            with closing(steps_after(self.progress.step)) as steps:
                self._train(steps)
        except WentBack as back:
            self._pending.clear()
            self.progress = back.progress
            for callback in self.callbacks:
                callback.on_went_back(self.progress.step)
            return False
        return True

    def _train(self, steps: Iterator[StepBatches]) -> None:
        clock = time.perf_counter()
        self._own_time.start()
        for step in range(self.progress.step + 1, self.run.training.train_iters + 1):
            for callback in self.callbacks:
                with self._time_of(callback):
                    callback.on_step_begin(self, step)
            asked = time.perf_counter()
            micro_batches, fault = next(steps)
            data_wait = time.perf_counter() - asked
            record = self.train_step(step, micro_batches, fault)
            record.data_wait, record.step_time = data_wait, time.perf_counter() - clock
            clock = time.perf_counter()
            self._pending.append(record)
            for callback in self.callbacks:
                with self._time_of(callback):
                    callback.on_step_end(self, record)
            self.report(keep=self._unread)
            if self.stopping:
                break
        self.report(keep=0)

    def train_step(self, step: int, micro_batches: Sequence[Batch], fault: Fault | None = None) -> StepRecord:
        """Do one optimizer step: forward and backward of each micro-batch, then the update."""
        engine = self.engine
        lr = set_hyperparameters(engine.optimizer, self.run.training, step, num_updates=step - engine.skipped_steps)
        sums = self.run_step(step, micro_batches)
        sums = self.global_sums(sums, float(self.wants_stop), float(fault is not None))
        own_time = self._own_time.take()
        self._own_time.start()
        norm, scale = gradient_norm(engine), loss_scale(engine)
        return StepRecord(
            step, LateNumbers(sums), lr, norm, scale, engine.skipped_steps, own_time=own_time, fault=fault
        )

    def run_step(self, step: int, micro_batches: Sequence[Batch]) -> torch.Tensor:
        """Launch forward and backward of each micro-batch and the update; give this rank's sums."""
        batches = [batch.to(self.topology.device) for batch in micro_batches]
        return self.runner.train(batches, self.step_info(step, batches), partial(self._seed_dropout, step))

    def step_info(self, step: int, batches: Sequence[Batch]) -> StepInfo:
        """Give what all micro-batches of a step have in common, on all ranks."""
        return StepInfo(self.global_counts(batches), warmup=step <= self.warmup_steps)

    def global_counts(self, batches: Sequence[Batch]) -> GlobalCounts:
        """Selected positions and tokens of the whole global batch, known before any forward pass."""
        selected = sum(batch.selected.num_tokens for batch in batches)
        tokens = sum(batch.sequences.num_tokens for batch in batches)
        device = self.topology.device
        counts = torch.stack([torch.full((), float(count), device=device) for count in (selected, tokens)])
        self._own_time.stop()  # this is where ranks first wait for each other
        dist.all_reduce(counts, group=self.topology.group("dp"))
        return GlobalCounts(counts[0], counts[1])

    def global_sums(self, sums: torch.Tensor, *more: float) -> torch.Tensor:
        """Give the sums of all micro-batches of all ranks, and `more` added up over all ranks."""
        if self.topology.rank("tp"):
            sums = torch.zeros_like(sums)  # tensor-parallel ranks have seen the same
        # filled on the device: a copy of the host's numbers would wait for all that is under way there
        sums = torch.cat([sums, *(torch.full_like(sums[:1], number) for number in more)])
        dist.all_reduce(sums)
        return sums

    def end_at_fault(self, num_faults: float, own: Fault | None) -> None:
        """Raise, on all ranks alike, the first fault in the samples of a step, where there is one on any rank.

        Args:
            num_faults: ranks that have found one, the same number on all ranks.
            own: what this rank has found.
        """
        if num_faults:
            found = [fault for fault in self._coordinator.exchange(own) if fault is not None]
            raise UserError(min(found).message)

    def report(self, keep: int) -> None:
        """Read back all but the newest `keep` steps and pass their metrics on, so that no step waits for its own."""
        while len(self._pending) > keep:
            record = self._pending.popleft()
            *sums, stop_votes, num_faults = record.sums.tolist()
            self.end_at_fault(num_faults, record.fault)
            self.stopping |= stop_votes > 0
            progress = self.meter.advance(self.progress, sums, record)
            metrics = self.meter.metrics(sums, record, progress)
            for callback in self.callbacks:
                callback.on_step_known(self, record, metrics)
            self.progress = progress
            for callback in self.callbacks:
                callback.on_metrics(metrics)

    @contextlib.contextmanager
    def _time_of(self, callback: Callback) -> Iterator[None]:
        """Count what a callback does as what it is; ranks wait for each other in what is not training."""
        if callback.part == "train":
            yield
            return
        self._own_time.stop()
        try:
            with self.spent.on(callback.part):
                yield
        finally:
            self._own_time.start()

    def _seed_dropout(self, step: int, micro: int, *where: str | int) -> None:
        """Begin a dropout stream for each micro-batch, so that a resumed run draws what an uninterrupted one would."""
        if self.run.model.hidden_dropout or self.run.model.attention_dropout:
            torch.manual_seed(stream_seed(self.run.seed, "dropout", step, micro, self.topology.rank("dp"), *where))
