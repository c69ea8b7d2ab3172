"""What a run says of itself when it ends."""

from __future__ import annotations

import math
import time
from typing import Any

from peer_scale.settings.run import RunConfig
from peer_scale.training.callbacks.console import duration
from peer_scale.training.callbacks.page import write_page
from peer_scale.training.goodput import Goodput
from peer_scale.training.trainer import Callback, Trainer


class ClosingSummary(Callback):
    """Prints steps, time, tokens, FLOPs, the last and best metrics, what was written and what can be done with it.

    For the first rank; the last of the callbacks, so that all is written when it speaks.
    """

    def __init__(self, run: RunConfig, first_step: int, goodput: Goodput | None = None) -> None:
        self._run, self._first_step, self._goodput = run, first_step, goodput
        self._begin = time.perf_counter()
        self._last: dict[str, Any] = {}
        self._best: dict[str, tuple[float, int]] = {}

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        self._last = metrics
        losses = ("loss", "validation_loss")
        for name in (*losses, *self._run.objective.progress_metrics):
            value = metrics.get(name)
            if value is None or not math.isfinite(value):
                continue
            sign = 1 if name in losses else -1
            if name not in self._best or sign * value < sign * self._best[name][0]:
                self._best[name] = value, metrics["step"]

    def on_train_end(self, trainer: Trainer) -> None:
        if self._last:
            print(self.text(trainer.progress.step), flush=True)
            self._write_page()

    def _write_page(self) -> None:
        output = self._run.output
        if output.log_dir is not None and output.report and (page := write_page(output.log_dir)) is not None:
            print(f"{'report':<{len('checkpoint')}}  {page}", flush=True)

    def text(self, step: int) -> str:
        """Give the summary as aligned lines."""
        run, last = self._run, self._last
        total = run.training.train_iters
        ended = f"all {total:,} steps done" if step >= total else f"stopped after step {step:,} of {total:,}"
        lines = {
            "run": f"{ended}; {step - self._first_step:,} in this run, {duration(time.perf_counter() - self._begin)}",
            "seen": f"{last['samples']:,} sequences, {last['tokens']:,} tokens (fill {self._fill:.1%}); "
            f"{last['train_flops']:.3g} FLOPs (the paper's accounting)",
            "last": self._describe({name: last[name] for name in self._best if last.get(name) is not None}),
            "best": ", ".join(
                f"{self._label(name)} {value:.4f} (step {at:,})" for name, (value, at) in self._best.items()
            ),
            **({} if self._goodput is None else {"time": self._goodput.describe()}),
            **self._written(),
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())

    @property
    def _fill(self) -> float:
        """Share of the padded sequences' positions that were tokens, of all steps so far."""
        return self._last["tokens"] / (self._last["samples"] * self._run.training.seq_length)

    def _describe(self, values: dict[str, float]) -> str:
        return ", ".join(f"{self._label(name)} {value:.4f}" for name, value in values.items())

    def _label(self, name: str) -> str:
        return self._run.objective.progress_metrics.get(name, name.replace("_", " "))

    def _written(self) -> dict[str, str]:
        """Say where checkpoints and logs are, and which commands use them."""
        save, log_dir = self._run.output.save, self._run.output.log_dir
        lines = {}
        if save is not None:
            lines["checkpoint"] = f"{save}"
            lines["go on"] = "the same command with a greater --train-iters"
            lines["convert"] = f"peer-scale convert to-hf --load {save}"
        else:
            lines["checkpoint"] = "none: give --save DIR to keep the weights"
        if log_dir is not None:
            lines["logs"] = f"{log_dir}: metrics.jsonl, summary.json, run.yaml, TensorBoard events"
            lines["look"] = f"tensorboard --logdir {log_dir}"
        return lines
