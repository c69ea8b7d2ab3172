"""From a step's sums to the metrics that are reported: losses, throughput, FLOPs."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

import torch

from peer_scale.checkpoints.progress import Progress
from peer_scale.flops import actual_train_flops, measure_peak_flops, paper_train_flops, peak_flops
from peer_scale.objectives.graph import SampleSize
from peer_scale.objectives.objective import SumsLayout
from peer_scale.samples.loader import Fault
from peer_scale.settings.run import RunConfig
from peer_scale.training.late_numbers import LateNumbers


@dataclass
class StepRecord:
    """What is known of a step when it has been launched; `sums` and `grad_norm` may still be under way on the device.

    `own_time` is what `StepClock` knows of the step, in seconds, to be read after the sums. `fault` is what this rank
    found wrong with its own samples of the step; `sums` end with the count of such ranks.
    """

    step: int
    sums: LateNumbers
    lr: float
    grad_norm: SupportsFloat | None
    loss_scale: float
    skipped_steps: int
    step_time: float = 0.0
    data_wait: float = 0.0
    own_time: SupportsFloat = 0.0
    fault: Fault | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class Meter:
    """Knows the costs of a step and the device's peak; `peak` in FLOP/s per device, None where it is not known."""

    def __init__(self, run: RunConfig, num_devices: int, peak: float | None) -> None:
        self._run, self._num_devices, self._peak = run, num_devices, peak
        self._layout = SumsLayout(run.objective)
        seq_length, samples = run.training.seq_length, run.training.global_batch_size
        self._positions = samples * seq_length
        self._paper_flops = paper_train_flops(run.model, run.objective, seq_length=seq_length, samples=1)

    def advance(self, progress: Progress, sums: list[float], record: StepRecord) -> Progress:
        """Give the progress after one more step."""
        return Progress(
            record.step,
            progress.samples + self._run.training.global_batch_size,
            progress.tokens + int(self._size(sums).tokens),
        )

    def metrics(self, sums: list[float], record: StepRecord, progress: Progress) -> dict[str, Any]:
        """Make the line of metrics.jsonl for one step, after which `progress` is reached."""
        metrics = self._layout.metrics(sums)
        losses = {loss.name: metrics.pop(loss.name) for loss in self._run.objective.losses}
        grad_norm = None if record.grad_norm is None else float(record.grad_norm)
        size = self._size(sums)
        flops_per_second = self._flops(size) / record.step_time / self._num_devices
        return {
            "step": record.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "loss": metrics.pop("loss"),
            **losses,
            "lr": record.lr,
            "grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None,
            "loss_scale": record.loss_scale,
            "skipped_steps": record.skipped_steps,
            "step_time_s": record.step_time,
            "data_wait_s": record.data_wait,
            "tokens_per_second": size.tokens / record.step_time,
            "fill": size.tokens / self._positions,
            "train_flops": self._paper_flops * progress.samples,
            "tflops_per_device": flops_per_second / 1e12,
            "mfu": flops_per_second / self._peak if self._peak else None,
            **metrics,
            **record.extra,
        }

    def _size(self, sums: list[float]) -> SampleSize:
        """Give the size of the whole step, all its samples together."""
        tokens, selected, token_pairs = (
            sums[self._layout.names.index(name)] for name in ("tokens", "selected", "token_pairs")
        )
        return SampleSize(tokens, selected, token_pairs)

    def _flops(self, size: SampleSize) -> float:
        """Count what a step of that size executes."""
        run = self._run
        return actual_train_flops(
            run.model, run.objective, size, samples=1, activation_checkpointing=run.training.activation_checkpointing
        )


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of `device`: known for common GPUs, measured once on the CPU."""
    if device.type == "cuda":
        return peak_flops(torch.cuda.get_device_name(device), dtype)
    return _cpu_peak(dtype, torch.get_num_threads())


@functools.cache
def _cpu_peak(dtype: torch.dtype, num_threads: int) -> float:
    return measure_peak_flops(dtype)
