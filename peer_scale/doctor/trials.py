"""What ranks run for the doctor: short training runs that are watched, and messages that are timed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from peer_scale.doctor.bandwidth import measure_links
from peer_scale.kernels.attention import describe_attention
from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from peer_scale.settings.run import RunConfig
from peer_scale.training.job import arrange_ranks, train
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback, Trainer

FIRST_QUIET_STEP, FIRST_STRICT_STEP, LAST_QUIET_STEP = 5, 8, 10
PROFILED_STEP = 6
_NUM_KERNELS = 12


class Curve(Callback):
    """Keeps the losses and the gradient norm of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_metrics(self, metrics: dict[str, Any]) -> None:
        names = [name for name in metrics if name == "loss" or name.endswith("_loss") or name == "grad_norm"]
        self.steps.append({name: metrics[name] for name in names})


class Synchronizations(Callback):
    """Finds what waits for the device in steps 5 to 10.

    Steps 5 to 7 list all such places; where they have none, steps 8 to 10 raise at the first, which leaves out nothing
    that does not come as a Python warning.
    """

    def __init__(self, set_mode: Callable[[str], None] | None = None) -> None:
        self.places: set[str] = set()
        self._set_mode = torch.cuda.set_sync_debug_mode if set_mode is None else set_mode
        self._recorder: warnings.catch_warnings | None = None
        self._recorded: list[warnings.WarningMessage] = []

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step == FIRST_QUIET_STEP - 1:
            self._recorder = warnings.catch_warnings(record=True)
            recorded = self._recorder.__enter__()
            assert recorded is not None, "it was asked to record"
            self._recorded = recorded
            warnings.simplefilter("always")
            self._set_mode("warn")
        elif record.step == FIRST_STRICT_STEP - 1:
            assert self._recorder is not None
            self._recorder.__exit__(None, None, None)
            # asking for the warnings is itself answered by one, which says that the mode is a prototype
            self.places = {
                f"{Path(one.filename).name}:{one.lineno}"
                for one in self._recorded
                if "synchroniz" in str(one.message) and "prototype" not in str(one.message)
            }
            self._set_mode("default" if self.places else "error")
        elif record.step == LAST_QUIET_STEP:
            self._set_mode("default")


class Kernels(Callback):
    """Profiles one step: the device's kernels by the time they take, or on the CPU torch's operators."""

    def __init__(self, device: torch.device) -> None:
        self.kernels: dict[str, float] = {}
        self.launches = 0
        self._is_gpu = device.type == "cuda"
        activities, kinds = torch.profiler.ProfilerActivity, torch.autograd.DeviceType
        self._profiler = torch.profiler.profile(activities=[activities.CUDA if self._is_gpu else activities.CPU])
        self._kind = kinds.CUDA if self._is_gpu else kinds.CPU

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        if record.step not in (PROFILED_STEP - 1, PROFILED_STEP):
            return
        if self._is_gpu:
            torch.cuda.synchronize()
        if record.step < PROFILED_STEP:
            self._profiler.start()
        else:
            self._profiler.stop()
            kind = "self_device_time_total" if self._is_gpu else "self_cpu_time_total"
            events = [event for event in self._profiler.key_averages() if event.device_type == self._kind]
            events.sort(key=lambda event: -getattr(event, kind))
            self.kernels = {event.key[:200]: getattr(event, kind) for event in events}
            self.launches = sum(event.count for event in events)


def curve(device: torch.device, flags: Sequence[str]) -> list[dict[str, float]]:
    """Train; give the losses and the gradient norm of every step."""
    watching = Curve()
    _train(device, flags, watching)
    return watching.steps


def synchronizations(device: torch.device, flags: Sequence[str]) -> list[str]:
    """Train; give the places in steps 5 to 10 that wait for the device, and raise where it is not known which."""
    watching = Synchronizations()
    _train(device, flags, watching)
    return sorted(watching.places)


def kernels(device: torch.device, flags: Sequence[str]) -> dict[str, Any]:
    """Train; give a step's longest kernels with their microseconds, and how attention should and did run."""
    watching = Kernels(device)
    run = _train(device, flags, watching)
    longest = dict(list(watching.kernels.items())[:_NUM_KERNELS])
    head_size = run.model.main_network.head_size
    return {
        "attention": describe_attention(device, run.compute_dtype, head_size, has_score_bias=False),
        "flash": sorted(name for name in watching.kernels if re.search("flash|fmha", name, re.IGNORECASE)),
        "launches": watching.launches,
        "microseconds": longest,
    }


def bandwidth(device: torch.device, flags: Sequence[str], **options: Any) -> dict[str, Any]:
    """Time messages within and between nodes."""
    return measure_links(device, **options)


def _train(device: torch.device, flags: Sequence[str], watching: Callback) -> RunConfig:
    run = resolve(build_parser().parse_args(list(flags)), dist.get_world_size())
    train(run, arrange_ranks(run, device), RankCoordinator(), [watching])
    return run


TRIALS: dict[str, Callable[..., Any]] = {
    "curve": curve,
    "synchronizations": synchronizations,
    "kernels": kernels,
    "bandwidth": bandwidth,
}
