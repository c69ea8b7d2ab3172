"""From a step's sums to the figures that are reported: losses, throughput, FLOPs, and whether all is well."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from peer_scale.checkpoints.progress import Progress
from peer_scale.errors import TrainingError
from peer_scale.flops import actual_train_flops, measure_peak_flops, paper_train_flops, peak_flops
from peer_scale.objectives.statistics import StatisticsLayout
from peer_scale.settings.run import RunConfig


@dataclass
class StepRecord:
    """What is known of a step when it has been launched; `sums` may still be under way on the device."""

    step: int
    sums: torch.Tensor
    lr: float
    grad_norm: Any
    loss_scale: float
    skipped_steps: int
    step_time: float = 0.0
    data_wait: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


class Meter:
    """Knows the cost of a sample and the device's peak; `peak` in FLOP/s a device, None where it is not known."""

    def __init__(self, run: RunConfig, num_devices: int, peak: float | None) -> None:
        self._run, self._num_devices, self._peak = run, num_devices, peak
        seq_length = run.training.seq_length
        self._paper_flops = paper_train_flops(run.model, seq_length=seq_length, samples=1)
        self._actual_flops = actual_train_flops(
            run.model,
            seq_length=seq_length,
            num_predictions=run.objective.num_predictions(seq_length),
            samples=1,
            activation_checkpointing=run.training.activation_checkpointing,
        )
        self._skipped_in_a_row = 0
        self._skipped_before = 0

    def figures(
        self, layout: StatisticsLayout, sums: list[float], record: StepRecord, progress: Progress
    ) -> dict[str, Any]:
        """The line of metrics.jsonl for one step; counts its samples into `progress`.

        Raises TrainingError for a loss or gradient that is not finite, or too many fp16 overflows in a row.
        """
        batch = self._run.training.global_batch_size
        progress.step = record.step
        progress.samples += batch
        tokens = int(sums[layout.names.index("tokens")])
        progress.tokens += tokens
        figures = layout.figures(sums, self._run.objective.tqr_weight)
        grad_norm = None if record.grad_norm is None else float(record.grad_norm)
        self._check_finite(record, figures, grad_norm)
        flops_a_second = self._actual_flops * batch / record.step_time / self._num_devices
        return {
            "step": record.step,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "loss": figures.pop("loss"),
            "mlm_loss": figures.pop("mlm_loss"),
            **({"tqr_loss": figures.pop("tqr_loss")} if "tqr_loss" in figures else {}),
            "lr": record.lr,
            "grad_norm": grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None,
            "loss_scale": record.loss_scale,
            "step_time_s": record.step_time,
            "data_wait_s": record.data_wait,
            "tokens_per_second": tokens / record.step_time,
            "train_flops": self._paper_flops * progress.samples,
            "tflops_per_device": flops_a_second / 1e12,
            "mfu": flops_a_second / self._peak if self._peak else None,
            **figures,
            **record.extra,
        }

    def _check_finite(self, record: StepRecord, figures: dict[str, Any], grad_norm: float | None) -> None:
        if self._run.training.precision == "fp16":
            self._check_skips(record)
            return
        for name in ("mlm_loss", "tqr_loss"):
            if name in figures and not math.isfinite(figures[name]):
                raise TrainingError(f"step {record.step}: {name} is {figures[name]}; a lower --lr may help")
        if grad_norm is not None and not math.isfinite(grad_norm):
            raise TrainingError(f"step {record.step}: the gradient norm is {grad_norm}; a lower --lr may help")

    def _check_skips(self, record: StepRecord) -> None:
        skipped = record.skipped_steps > self._skipped_before
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        self._skipped_before = record.skipped_steps
        if self._skipped_in_a_row >= self._run.training.max_skipped_steps:
            raise TrainingError(
                f"step {record.step}: fp16 gradients overflowed {self._skipped_in_a_row} steps in a row "
                f"(loss scale {record.loss_scale:g}); use bf16, or a lower --lr"
            )


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of `device`: known for common GPUs, measured once on the CPU."""
    if device.type == "cuda":
        return peak_flops(torch.cuda.get_device_name(device), dtype)
    return _cpu_peak(dtype, torch.get_num_threads())


@functools.cache
def _cpu_peak(dtype: torch.dtype, num_threads: int) -> float:
    return measure_peak_flops(dtype)
