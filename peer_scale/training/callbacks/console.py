"""Figures on the terminal: one line that stays put, or plain lines where there is no terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from peer_scale.training.trainer import Callback, Trainer


class ProgressLine(Callback):
    """Step, losses, tokens/s, TFLOP/s, MFU and time left (first rank only)."""

    def __init__(self, first_step: int, train_iters: int, log_interval: int) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._first_step, self._train_iters, self._log_interval = first_step, train_iters, log_interval
        self._seconds = 0.0
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, speed_estimate_period=120)
            self._task = self._bar.add_task("train", total=train_iters, completed=first_step, text="")
            self._bar.start()

    def on_figures(self, figures: dict[str, Any]) -> None:
        self._seconds += figures["step_time_s"]
        step = figures["step"]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=describe(figures))
        elif step % self._log_interval == 0 or step in (self._first_step + 1, self._train_iters):
            left = self._seconds / (step - self._first_step) * (self._train_iters - step)
            self._console.print(f"step {step}/{self._train_iters}  {describe(figures)}  ETA {duration(left)}")
        if "validation_loss" in figures:
            self._console.print(f"step {step}: validation loss {figures['validation_loss']:.4f}")
        self._console.file.flush()  # a log file shows where the run is

    def on_train_end(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(figures: dict[str, Any]) -> str:
    """The figures of one step in a line."""
    parts = [f"loss {figures['loss']:.4f}"]
    if "tqr_loss" in figures:
        parts.append(f"(mlm {figures['mlm_loss']:.4f}, tqr {figures['tqr_loss']:.4f})")
    parts.append(f"lr {figures['lr']:.2e}")
    parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{figures['tflops_per_device']:.3g} TFLOP/s")
    if figures["mfu"] is not None:
        parts.append(f"MFU {figures['mfu']:.1%}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
