"""Which rank is busy while others wait, in runs of two ranks of which one is held up."""

import contextlib
import io
import re
import time

import pytest
import torch
import torch.distributed as dist

from checkpoint_runs import flags_for
from peer_scale.kernels.availability import gpu_branches
from peer_scale.parallel.topology import single_process_topology
from peer_scale.training.callbacks.stragglers import Stragglers, over_median
from peer_scale.training.metering import StepRecord
from peer_scale.training.trainer import Callback
from runs import read_metrics, train_in_pool
from sync_detector import no_device_wait


def test_a_stage_is_compared_with_itself():
    assert over_median([1.0, 2.0, 3.0, 9.0, 9.0, 12.0], 3) == [-1.0, 0.0, 1.0, 0.0, 0.0, 3.0]
    assert over_median([0.25, 0.05], 2) == pytest.approx([0.2, 0.0]), "of two ranks the quick one is the measure"


def test_nobody_waits_for_what_ranks_tell_each_other():
    stragglers = Stragglers(single_process_topology(), 3, ["here"])
    found = {}
    for step in range(1, 7):
        record = StepRecord(step, torch.zeros(0), 0.1, None, 1.0, 0, data_wait=0.5, own_time=float(step))
        with gpu_branches(triton=False), no_device_wait():
            stragglers.on_step_end(None, record)
        metrics = {"step": step, "step_time_s": 1.0}
        stragglers.on_metrics(metrics)
        found[step] = metrics
    assert [step for step, metrics in found.items() if "busy_time_s" in metrics] == [3, 6]
    assert found[3]["busy_time_s"] == {"min": 2.0, "mean": 2.0, "max": 2.0}, "of the second step, the first compiles"
    assert found[6]["busy_time_s"]["mean"] == 4.0 and found[6]["rank_data_wait_s"]["max"] == 0.5
    assert found[6]["slowest_rank"] == 0


class Sleeps(Callback):
    """Holds up one rank at the end of each step."""

    def __init__(self, rank, seconds):
        self._seconds = seconds if dist.get_rank() == rank else 0.0

    def on_step_end(self, trainer, record):
        time.sleep(self._seconds)


def train_with_a_slow_rank(flags, rank, seconds):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        train_in_pool(flags, [Sleeps(rank, seconds)])
    return said.getvalue()


def compare(own_times):
    """Run by each rank: sixty steps in which it is busy for its time; gives what is said, and a step's metrics."""
    from peer_scale.parallel.topology import build_topology

    stragglers = Stragglers(build_topology(torch.device("cpu")), 10, ["here", "there"])
    said, found = io.StringIO(), {}
    with contextlib.redirect_stderr(said):
        for step in range(1, 61):
            record = StepRecord(step, torch.zeros(0), 0.1, None, 1.0, 0, own_time=own_times[dist.get_rank()])
            stragglers.on_step_end(None, record)
            metrics = {"step": step, "step_time_s": 0.3}
            stragglers.on_metrics(metrics)
            found |= metrics
    return said.getvalue(), found


@pytest.mark.parametrize(
    ("own_times", "line"),
    [
        ((0.05, 0.25), "warning: rank 1 on there holds up the others: for 50 steps it has been busy 0.25 s per step, "),
        ((0.05, 0.06), ""),  # within what is usual
        ((0.01, 0.02), ""),  # of no weight in a step of 0.3 s
    ],
)
def test_a_rank_is_named_once_when_it_has_been_slow_for_long(two_ranks, own_times, line):
    (said, found), (other, _) = two_ranks.run(compare, own_times)
    assert said.count("\n") == bool(line) and said.startswith(line) and other == ""
    assert found["slowest_rank"] == 1
    mean = sum(own_times) / 2
    assert found["busy_time_s"] == pytest.approx({"min": own_times[0], "mean": mean, "max": own_times[1]})


@pytest.mark.parametrize(
    ("seconds", "steps", "interval"), [(0.1, 11, 5), pytest.param(0.2, 60, 10, marks=pytest.mark.slow)]
)
def test_the_rank_that_sleeps_is_the_slowest(two_ranks, text_file, tmp_path, seconds, steps, interval):
    flags = flags_for(tmp_path, text_file, "log", "--log-interval", interval, steps=steps)
    said = two_ranks.run(train_with_a_slow_rank, flags, 1, seconds)
    metrics = [line for line in read_metrics(tmp_path / "log") if "slowest_rank" in line]
    assert [line["step"] for line in metrics] == list(range(interval, steps + 1, interval))
    assert {line["slowest_rank"] for line in metrics} == {1}
    busy = metrics[-1]["busy_time_s"]
    assert busy["max"] >= seconds and busy["min"] < seconds / 2
    assert metrics[-1]["peak_memory_bytes"]["min"] > 1e7
    if steps >= 60:
        (line,) = re.findall("warning: rank 1 on .*", said[0])
        assert "for 50 steps" in line
        assert "holds up the others" in (tmp_path / "log" / "ranks" / "rank_00000.log").read_text()
