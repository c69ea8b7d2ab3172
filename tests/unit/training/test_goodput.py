"""Where a run's time went, over its starts."""

import json
import time

import pytest

from peer_scale.checkpoints.progress import Progress
from peer_scale.training.goodput import Goodput
from peer_scale.training.time_spent import TimeSpent

TEN = {"tflops_per_device": 2.0, "step_time_s": 10.0, "samples": 8, "train_flops": 1e15}


class Clock:
    """Time that passes when told; stands for both of Python's clocks."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def spend(self, spent, part, seconds):
        with spent.on(part):
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def first_start(clock, path):
    """Three steps of 10 s, the second saved: 20 s of start, 5 of load, 2 of validation, 3 of saving."""
    spent = TimeSpent(seconds_before=20)
    goodput = Goodput(path, spent, began=clock.now - 20, progress=Progress(0, 8 * 0, 0))
    clock.spend(spent, "load", 5)
    spent.switch("train")
    for step in (1, 2, 3):
        clock.now += 10
        goodput.count({"step": step, "tokens": 100 * step, **TEN})
        if step == 2:
            clock.spend(spent, "validation", 2)
            clock.spend(spent, "save", 3)
            goodput.mark()
    return goodput


def test_parts_are_the_wall_time(clock, tmp_path):
    summary = first_start(clock, tmp_path / "summary.json").summary(1e13, 5.0)
    assert summary["parts_s"] == {
        **{"start": 20, "load": 5, "train": 30, "validation": 2, "save": 3},
        **{"lost": 0, "down": 0},
    }
    assert summary["wall_s"] == sum(summary["parts_s"].values()) == 60
    assert summary["goodput"] == 0.5 and summary["restarts"] == 0
    assert summary["tokens_per_second"] == 10 and summary["tflops_per_device"] == 2 and summary["mfu"] == 0.2


@pytest.mark.parametrize(("killed_after", "lost"), [(0.0, 10.0), (4.0, 14.0)])
def test_what_was_done_past_the_checkpoint_is_lost(clock, tmp_path, killed_after, lost):
    path = tmp_path / "summary.json"
    goodput = first_start(clock, path)
    goodput.write(goodput.summary(None, None))
    clock.now += killed_after
    alive = clock.now
    clock.now += 100  # until the next process begins
    spent = TimeSpent()
    again = Goodput(path, spent, began=clock.now, progress=Progress(2, 8 * 2, 200), starts=2, last_sign=alive)
    clock.now += 7
    spent.switch("train")
    for step in (3, 4):
        clock.now += 10
        again.count({"step": step, "tokens": 100 * step, **TEN})
    summary = again.summary(None, None)
    assert summary["parts_s"] == pytest.approx(
        {"start": 27, "load": 5, "train": 40, "validation": 2, "save": 3, "lost": lost, "down": 100}
    )
    assert summary["wall_s"] == pytest.approx(clock.now - 980)
    assert (summary["steps"], summary["tokens"], summary["restarts"]) == (4, 400, 1)
    assert summary["tokens_per_second"] == pytest.approx(10) and summary["tflops_per_device"] == pytest.approx(2)
    again.mark()
    again.write(summary)
    third = Goodput(path, TimeSpent(), began=clock.now + 1, progress=Progress(4, 8 * 4, 400), starts=3)
    assert third.parts() == pytest.approx({**summary["parts_s"], "down": 101})
    assert "3 starts" in third.describe() and third.describe().startswith("train ")


def test_a_process_that_goes_back_loses_what_it_had_done(clock, tmp_path):
    goodput = first_start(clock, tmp_path / "summary.json")
    goodput.go_back(2)
    clock.now += 10
    goodput.count({"step": 3, "tokens": 300, **TEN})
    summary = goodput.summary(None, None)
    assert summary["parts_s"] == pytest.approx(
        {"start": 20, "load": 5, "train": 30, "validation": 2, "save": 3, "lost": 10, "down": 0}
    )
    assert summary["tokens_per_second"] == pytest.approx(10) and summary["tflops_per_device"] == pytest.approx(2)
    goodput.go_back(0)
    assert goodput.parts()["lost"] == pytest.approx(45) and goodput.parts()["train"] == pytest.approx(0)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"for_the_next_start": {"began": "yesterday"}}'])
def test_a_file_that_says_nothing_is_a_beginning(clock, tmp_path, content):
    path = tmp_path / "summary.json"
    path.write_text(content)
    goodput = Goodput(path, TimeSpent(), began=5.0, progress=Progress(7, 8 * 7, 70))
    assert sum(goodput.parts().values()) == 0
    goodput.write(goodput.summary(None, None))
    assert json.loads(path.read_text())["steps"] == 7
