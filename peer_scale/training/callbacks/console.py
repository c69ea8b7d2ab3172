"""Figures on the terminal: one line that stays put, or plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peer_scale.objectives.objective import Objective
from peer_scale.settings.run import RunConfig
from peer_scale.training.trainer import Callback, Trainer


class ProgressLine(Callback):
    """Step, losses, tokens/s, TFLOP/s, MFU and time left (first rank only)."""

    def __init__(self, run: RunConfig, first_step: int, notices: Mapping[int, str]) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._first_step, self._train_iters = first_step, run.training.train_iters
        self._log_interval, self._objective, self._notices = run.output.log_interval, run.objective, notices
        self._seconds = 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, speed_estimate_period=120)
            self._task = self._bar.add_task("train", total=self._train_iters, completed=first_step, text="")
            self._bar.start()

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        self._seconds += metrics["step_time_s"]
        step = metrics["step"]
        if step in self._notices:
            self._console.print(f"step {step}: {self._notices[step]}")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=describe(metrics, self._objective))
        elif step % self._log_interval == 0 or step in (self._first_step + 1, self._train_iters):
            left = self._seconds / (step - self._first_step) * (self._train_iters - step)
            self._console.print(
                f"step {step}/{self._train_iters}  {describe(metrics, self._objective)}  ETA {duration(left)}"
            )
        if "validation_loss" in metrics:
            self._console.print(f"step {step}: validation loss {metrics['validation_loss']:.4f}")
        self._console.file.flush()  # a log file shows where the run is

    def on_train_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(metrics: dict[str, Any], objective: Objective) -> str:
    """Give the metrics of one step in a line."""
    parts = [f"loss {metrics['loss']:.4f}"]
    if len(objective.losses) > 1:
        losses = (f"{loss.name.removesuffix('_loss')} {metrics[loss.name]:.4f}" for loss in objective.losses)
        parts.append(f"({', '.join(losses)})")
    for name, label in objective.progress_metrics.items():
        if metrics[name] is not None:
            parts.append(f"{label} {metrics[name]:.3f}")
    parts.append(f"lr {metrics['lr']:.2e}")
    parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{metrics['tflops_per_device']:.3g} TFLOP/s")
    if metrics["mfu"] is not None:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
