"""A run that is killed while it saves loads at its last committed step and goes on as if nothing had happened."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpoint_runs import flags_for, without_times
from peer_scale.checkpoints.folder import committed, newest
from peer_scale.checkpoints.pieces import check_file
from rank_pool import free_port
from runs import read_metrics, train_in_pool


def rank_of_run(rank, ranks, port, log, flags):
    """The body of a process that is there to be killed."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    train_in_pool(flags)
    torch.distributed.destroy_process_group()


class KilledRuns:
    """Two ranks, forked from a server that has imported everything: starting them takes a second or two."""

    def __init__(self, folder):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["peer_scale.training.job", "test_checkpoint_kills"])
        self._log = folder / "ranks.log"

    def start(self, flags):
        self._log.write_text("")
        port = free_port()
        processes = [
            self._context.Process(target=rank_of_run, args=(rank, 2, port, str(self._log), flags)) for rank in range(2)
        ]
        for process in processes:
            process.start()
        return processes

    @property
    def log(self):
        return self._log.read_text()


def kill_while_saving(processes, save, steps_away, rng, runs):
    """SIGKILL one rank, and a little later the other, at some moment between a save's first trace and its last."""

    def wait_until(condition):
        deadline = time.monotonic() + 90
        while not condition():
            assert all(process.is_alive() for process in processes), runs.log
            assert time.monotonic() < deadline, runs.log
            time.sleep(0.001)

    first = newest_step(save)
    wait_until(lambda: "step " in runs.log and not steps_begun(save))  # the start removes what is left over
    wait_until(lambda: any(step > first + steps_away for step in steps_begun(save)))
    time.sleep(rng.uniform(0, 0.06))
    for process in rng.sample(processes, 2):
        process.kill()  # unless the other's end was its own
        time.sleep(rng.choice((0, 0.05)))
    for process in processes:
        process.join()


def newest_step(save):
    return max((int(folder.name[-8:]) for folder in committed(save)), default=0)


def steps_begun(save):
    return [int(path.name[-8:]) for path in save.glob(".writing_step_*")] if save.exists() else []


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_of_saving_it_loads_at_the_last_committed_step(kills, two_ranks, text_file, tmp_path):
    rng = random.Random(kills)
    steps = 4 * kills + 4
    save = tmp_path / "save"

    def flags(name, *more):
        return flags_for(tmp_path, text_file, name, *more, "--model", "bert-tiny", steps=steps)

    whole = two_ranks.run(train_in_pool, flags("whole"))[0]
    saving = flags("cut", "--save", save, "--load", save, "--save-interval", 1, "--keep-last", 2)
    runs = KilledRuns(tmp_path)
    unfinished = 0
    for _ in range(kills):
        processes = runs.start(saving)
        before = newest_step(save)
        kill_while_saving(processes, save, rng.randrange(3), rng, runs)
        if before:
            assert f"after step {before}" in runs.log
        unfinished += bool(steps_begun(save))
        assert_loads(save)
    processes = runs.start(saving)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, runs.log
    assert unfinished >= kills // 4, "the kills came too late to test anything"
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
