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
    """What a process has at a step: resident bytes, open files, threads."""

    step: int
    memory: int
    files: int
    threads: int


@pytest.mark.slow
@pytest.mark.skipif(STEPS < 2 * SETTLED, reason=f"takes minutes: PEER_TEST_SOAK_STEPS=20000, at least {2 * SETTLED}")
def test_a_long_run_neither_grows_nor_slows_down(tmp_path, text_file):
    flags = flags_of_long_run(
        *(tmp_path, text_file, STEPS, "--num-workers", 1),
        *("--save-interval", 50, "--eval-interval", 200, "--eval-iters", 2),
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
    for name, seen in zip(("rank", "data worker"), samples, strict=True):
        early = [sample for sample in seen if SETTLED < sample.step <= SETTLED + 1000]
        late = [sample for sample in seen if sample.step > STEPS - 1000]
        for what in ("memory", "files", "threads"):
            before, after = (statistics.median_low(getattr(sample, what) for sample in part) for part in (early, late))
            print(f"{name}: {what} {before:,} -> {after:,} ({after / before - 1:+.2%})")
            assert after < 1.02 * before if what == "memory" else after == before, (name, what, before, after)
    metrics = read_metrics(tmp_path / "log")
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert sum("validation_loss" in line for line in metrics) == STEPS // 200
    times = [line["step_time_s"] for line in metrics]
    before, after = statistics.median(times[SETTLED : SETTLED + 1000]), statistics.median(times[-1000:])
    print(f"step time: {1000 * before:.2f} -> {1000 * after:.2f} ms ({after / before - 1:+.2%})")
    assert abs(after / before - 1) < 0.05


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
                found = Sample(step, each.memory_info().rss, each.num_fds(), each.num_threads())
            except psutil.NoSuchProcess:
                continue
            samples[each.pid].append(found)
    return [seen for seen in samples.values() if seen[0].step < SETTLED and seen[-1].step > STEPS - 1000]
