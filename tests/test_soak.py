"""A run of a day's length in steps: nothing grows, nothing is left open, nothing slows down."""

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from typing import NamedTuple

import psutil
import pytest

from long_runs import flags_of_long_run
from runs import PROJECT, outside_of_ranks, read_metrics

STEPS = int(os.environ.get("PEER_TEST_SOAK_STEPS", "0"))
SETTLED = 2000
"""Steps after which all that a run keeps is there."""


class Sample(NamedTuple):
    """What a process has at a step: resident bytes, open files, threads; and the seconds it has computed so far."""

    step: int
    memory: int
    files: int
    threads: int
    cpu: float


@pytest.mark.slow
@pytest.mark.skipif(STEPS < 2 * SETTLED, reason=f"takes minutes: PEER_TEST_SOAK_STEPS=20000, at least {2 * SETTLED}")
def test_a_long_run_neither_grows_nor_slows_down(tmp_path, text_file):
    flags = flags_of_long_run(
        *(tmp_path, text_file, STEPS, "--num-workers", 1),
        *("--micro-batch-size", 4, "--save-interval", 50, "--eval-interval", 200, "--eval-iters", 2),
    )
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, PROJECT / "peer_scale/pretrain.py", *flags],
            **{"cwd": PROJECT, "env": outside_of_ranks(), "stdout": said, "stderr": said},
        )
        try:
            samples = watch(process, tmp_path / "log" / "metrics.jsonl")
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert len(samples) == 2, "the rank and its data worker"
    spans = (SETTLED, SETTLED + 1000), (STEPS - 1000, STEPS)
    for name, seen in zip(("rank", "data worker"), samples, strict=True):
        parts = [[sample for sample in seen if first < sample.step <= last] for first, last in spans]
        for what in ("memory", "files", "threads"):
            before, after = (statistics.median_low(getattr(sample, what) for sample in part) for part in parts)
            print(f"{name}: {what} {before:,} -> {after:,} ({after / before - 1:+.2%})")
            assert after < 1.02 * before if what == "memory" else after == before, (name, what, before, after)
    metrics = read_metrics(tmp_path / "log")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert sum("validation_loss" in line for line in metrics) == STEPS // 200
    by_clock = change("step", *(statistics.median(line["step_time_s"] for line in metrics[slice(*at)]) for at in spans))
    parts = [[sample for sample in samples[0] if first < sample.step <= last] for first, last in spans]
    computed = change("computing", *((part[-1].cpu - part[0].cpu) / (part[-1].step - part[0].step) for part in parts))
    assert min(by_clock, computed) < 1.05, "slower by the clock, and not because others have the processors"


def change(what, before, after):
    print(f"{what}: {1000 * before:.2f} -> {1000 * after:.2f} ms ({after / before - 1:+.2%})")
    return after / before


def watch(process, metrics):
    """Look at a run's processes until it ends; give the samples of each that lived on, the rank's first."""
    samples = defaultdict(list)
    step = position = 0
    while process.poll() is None:
        time.sleep(0.5)
        if metrics.exists():
            with metrics.open("rb") as file:
                file.seek(position)
                new = file.read()
            step, position = step + new.count(b"\n"), position + len(new)
        rank = psutil.Process(process.pid)
        for each in (rank, *rank.children(recursive=True)):
            try:
                if any("resource_tracker" in word for word in each.cmdline()):
                    continue  # Python's own, of the processes that tokenised
                times = each.cpu_times()
                found = Sample(
                    step, each.memory_info().rss, each.num_fds(), each.num_threads(), times.user + times.system
                )
            except psutil.NoSuchProcess:
                continue
            samples[each.pid].append(found)
    return [seen for seen in samples.values() if seen[0].step < SETTLED and seen[-1].step > STEPS - 1000]
