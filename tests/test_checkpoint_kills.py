"""A run that is killed while it saves loads at its last committed step and goes on as if nothing had happened."""

import random
import time
from pathlib import Path

import pytest

from checkpoint_runs import flags_for, without_times
from forked_ranks import ForkedRanks
from peer_scale.checkpoints.folder import committed, newest
from peer_scale.checkpoints.pieces import check_file
from runs import read_metrics, train_in_pool


def kill_while_saving(ranks, save, steps_away, rng):
    """SIGKILL one rank, and a little later the other, at some moment between a save's first trace and its last."""
    first = newest_step(save)
    # the start removes what is left over
    ranks.wait_until(lambda: "step " in ranks.said[0] and not steps_begun(save), pause=0.001)
    ranks.wait_until(lambda: any(step > first + steps_away for step in steps_begun(save)), pause=0.001)
    time.sleep(rng.uniform(0, 0.06))
    for process in rng.sample(ranks.processes, 2):
        process.kill()  # unless the other's end was its own
        time.sleep(rng.choice((0, 0.05)))
    ranks.end()


def newest_step(save):
    return max((int(folder.name[-8:]) for folder in committed(save)), default=0)


def steps_begun(save):
    return [int(path.name[-8:]) for path in save.glob(".writing_step_*")] if save.exists() else []


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_at_any_moment_of_saving_it_loads_at_the_last_committed_step(kills, two_ranks, text_file, tmp_path):
    rng = random.Random(kills)
    steps = 4 * kills + 4
    save = tmp_path / "save"

    def flags(name, *more):
        return flags_for(tmp_path, text_file, name, *more, "--model", "bert-tiny", steps=steps)

    whole = two_ranks.run(train_in_pool, flags("whole"))[0]
    saving = flags("cut", "--save", save, "--load", save, "--save-interval", 1, "--keep-last", 2)
    saving = ["--num-threads", 1, *saving]
    unfinished = 0
    for _ in range(kills):
        ranks = ForkedRanks(saving, 2, tmp_path)
        before = newest_step(save)
        kill_while_saving(ranks, save, rng.randrange(3), rng)
        if before:
            assert f"after step {before}" in ranks.said[0]
        unfinished += bool(steps_begun(save))
        assert_loads(save)
    ranks = ForkedRanks(saving, 2, tmp_path)
    assert ranks.end() == [0, 0], ranks.said
    assert unfinished >= max(1, kills // 4), "the kills came too late to test anything"
    assert without_times(read_metrics(tmp_path / "cut")) == without_times(whole)
    assert sorted(path.name for path in save.iterdir()) == [
        "latest",
        *(f"step_{step:08d}" for step in (steps - 1, steps)),
    ]


def assert_loads(save: Path):
    found = newest(save)
    if found is None:
        assert not (save / "latest").exists()
        return
    folder, manifest = found
    for name, entry in manifest.files.items():
        check_file(folder / name, entry)
    names = [path.name for path in committed(save)]
    assert not (save / "latest").exists() or (save / "latest").read_text() in names
