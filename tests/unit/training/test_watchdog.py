"""The thread that ends a run which does not get on, in processes that may end."""

import os
import time

import pytest

from peer_scale.training.callbacks.watchdog import Watchdog
from peer_scale.training.metering import StepRecord
from rank_pool import fork_server

pytestmark = pytest.mark.heavy


def stall(folder, limit, seconds, log, rank=0):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    with Watchdog(folder, rank, 2, limit=limit, interval=0.1) as watchdog:
        watchdog.begin_step(7)
        time.sleep(seconds)
        watchdog.end_step(StepRecord(7, None, 0.0, None, 1.0, 0))
        time.sleep(seconds)
        watchdog.begin_step(8)
    time.sleep(seconds)  # what follows is not watched


def ends(folder, limit, seconds, tmp_path, rank=0):
    log = tmp_path / "log"
    process = fork_server().Process(target=stall, args=(folder, limit, seconds, str(log), rank))
    process.start()
    process.join(30)
    return process.exitcode, log.read_text()


def test_a_stalled_rank_ends_and_says_where_it_was(tmp_path):
    beats = tmp_path / "heartbeats"
    beats.mkdir()
    (beats / "rank_00001.json").write_text("{}")
    os.utime(beats / "rank_00001.json", (1, 1))
    code, said = ends(tmp_path, 0.5, 20, tmp_path)
    assert code == 75
    assert "error: step 7 has taken more than 0 s on rank 0; no sign of life from rank 1; stacks are in" in said
    assert "in stall" in (tmp_path / "stacks" / "rank_00000.txt").read_text()


def test_a_rank_speaks_only_for_those_before_it_that_are_silent(tmp_path):
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "rank_00000.json").write_text("{}")
    os.utime(tmp_path / "heartbeats" / "rank_00000.json", (2**33, 2**33))
    code, said = ends(tmp_path, 0.3, 20, tmp_path, rank=1)
    assert code == 75 and said == ""


def test_without_a_folder_stacks_are_on_stderr(tmp_path):
    code, said = ends(None, 0.3, 20, tmp_path, rank=1)
    assert code == 75 and "in stall" in said and "stacks are above" in said


def start(folder, rank, log):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    with Watchdog(folder, rank, 2, limit=0.2, interval=0.05):
        time.sleep(1.5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_start_takes_as_long_as_it_likes_while_nobody_is_missing(tmp_path, rank, is_there):
    (tmp_path / "heartbeats").mkdir()
    other = tmp_path / "heartbeats" / f"rank_{1 - rank:05d}.json"
    other.touch()
    os.utime(other, (2**33, 2**33) if is_there else (1, 1))
    process = fork_server().Process(target=start, args=(tmp_path, rank, str(tmp_path / "log")))
    process.start()
    process.join(30)
    said = (tmp_path / "log").read_text()
    if is_there:
        assert (process.exitcode, said) == (0, "")
    else:
        assert process.exitcode == 75
        assert f"error: the start has taken more than 0 s on rank {rank}; no sign of life from rank {1 - rank};" in said


@pytest.mark.parametrize("limit", [None, 0, 5])
def test_what_gets_on_is_left_alone(tmp_path, limit):
    assert ends(tmp_path, limit, 0.3, tmp_path) == (0, "")


def test_limits_follow_the_slowest_steps():
    watchdog = Watchdog(None, 0, 1)
    assert watchdog.limit(is_step=True) == 30 * 60, "the first step may compile"
    record = StepRecord(1, None, 0.0, None, 1.0, 0)
    watchdog.end_step(record)
    assert watchdog.limit(is_step=True) == 60
    assert watchdog.limit(is_step=False) == 30 * 60
    watchdog._section.begun -= 20
    watchdog.end_step(record)
    assert watchdog.limit(is_step=True) == pytest.approx(200, abs=1)
    assert Watchdog(None, 0, 1, limit=0).limit(is_step=True) == float("inf")
