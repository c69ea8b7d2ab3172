"""A run of which one rank does not get on ends, and says which."""

import os
import signal
import time

import pytest

from checkpoint_runs import flags_for
from forked_ranks import ForkedRanks

LIMIT = 3.0


def in_a_step(ranks, folder):
    ranks.wait_until(lambda: _steps(folder) > 3)


def in_a_save(ranks, folder):
    """Wait for a save's folder; whoever is stopped then keeps it from getting its name."""
    ranks.wait_until(lambda: _steps(folder) > 3)
    ranks.wait_until(lambda: any((folder / "save").glob(".writing_*")), pause=0.0005)


def in_tokenising(ranks, folder):
    ranks.wait_until(lambda: "training a WordPiece" in ranks.said[0])


MOMENTS = {
    "step": (in_a_step, ()),
    "validation": (in_a_step, ("--eval-interval", 1, "--eval-iters", 50)),
    "save": (in_a_save, ("--save", "save", "--save-interval", 1, "--no-async-save")),
    "save in the background": (in_a_save, ("--save", "save", "--save-interval", 1)),
    "tokenising": (in_tokenising, ("--cache-dir", "cache")),
}


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stopped_rank_is_named_by_the_others(tmp_path, text_file, moment, stopped):
    comes, more = MOMENTS[moment]
    more = [tmp_path / word if word in ("save", "cache") else word for word in more]
    flags = flags_for(tmp_path, text_file, "log", "--stall-minutes", LIMIT / 60, *more, steps=100_000)
    ranks = ForkedRanks(flags, 2, tmp_path)
    comes(ranks, tmp_path)
    os.kill(ranks.processes[stopped].pid, signal.SIGSTOP)
    began = time.monotonic()
    left = ranks.processes[1 - stopped]
    left.join(60)
    took = time.monotonic() - began
    said = ranks.said[1 - stopped]
    ranks.processes[stopped].kill()
    ranks.processes[stopped].join()
    assert left.exitcode == 75, said
    assert took < LIMIT + 5 + 4, "the limit, and what is allowed beyond it, on a loaded machine"
    assert f"no sign of life from rank {stopped};" in said
    stacks = tmp_path / "log" / "stacks" / f"rank_{1 - stopped:05d}.txt"
    assert f"stacks are in {stacks.parent}" in said and "job.py" in stacks.read_text()


def _steps(folder):
    file = folder / "log" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
