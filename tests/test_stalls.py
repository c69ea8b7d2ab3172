"""A run of which one rank does not get on ends, and says which."""

import os
import signal
import time

import pytest

from checkpoint_runs import flags_for
from forked_ranks import ForkedRanks


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--eval-interval", 1, "--eval-iters", 50)])
@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_rank_is_named_by_the_others(tmp_path, text_file, stopped, more):
    flags = flags_for(tmp_path, text_file, "log", "--stall-minutes", 0.1, *more, steps=100_000)
    ranks = ForkedRanks(flags, 2, tmp_path)
    ranks.wait_until(lambda: _steps(tmp_path) > 3)
    os.kill(ranks.processes[stopped].pid, signal.SIGSTOP)
    began = time.monotonic()
    left = ranks.processes[1 - stopped]
    left.join(60)
    took = time.monotonic() - began
    said = ranks.said[1 - stopped]
    ranks.processes[stopped].kill()
    ranks.processes[stopped].join()
    assert left.exitcode == 75, said
    assert took < 6 + 5 + 4, "the limit, and what is allowed beyond it, on a loaded machine"
    assert f"no sign of life from rank {stopped};" in said
    stacks = tmp_path / "log" / "stacks" / f"rank_{1 - stopped:05d}.txt"
    assert f"stacks are in {stacks.parent}" in said and "trainer.py" in stacks.read_text()


def _steps(folder):
    file = folder / "log" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0
