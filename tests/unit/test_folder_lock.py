"""One process at a time in a folder: the second is refused by name, a killed owner holds up nobody."""

import json
import multiprocessing
import os
import re
import signal
import time

import pytest

from peer_scale.errors import UserError
from peer_scale.folder_lock import OWNER, FolderLock

WAYS = pytest.mark.parametrize("use_locks", [True, False], ids=["locks", "heartbeat"])


def hold(folder, use_locks, with_child, pipe):
    FolderLock(folder, "--save", {"SLURM_JOB_ID": "77"}).acquire(use_locks=use_locks)
    child = os.fork() if with_child else None
    if child == 0:
        time.sleep(30)
        os._exit(0)
    pipe.send(child)
    time.sleep(30)


@pytest.fixture
def owner(tmp_path):
    """Start a process that holds the folder, and perhaps forks a child as data workers are forked."""
    started = []

    def start(use_locks, with_child=False):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=hold, args=(tmp_path, use_locks, with_child, theirs), daemon=True
        )
        process.start()
        child = ours.recv()
        started.append((process, child))
        return process

    yield start
    for process, child in started:
        process.kill()
        process.join()
        if child:
            os.kill(child, signal.SIGKILL)


@WAYS
def test_the_second_is_refused_and_told_of_the_first(use_locks, owner, tmp_path):
    first = owner(use_locks)
    with pytest.raises(UserError) as refused:
        FolderLock(tmp_path, "--save").acquire(use_locks=use_locks)
    assert re.fullmatch(
        rf"--save {tmp_path}: another run is at work there \(host .+, process {first.pid}, "
        r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d, slurm job 77\); give another folder",
        str(refused.value),
    )


@WAYS
def test_a_killed_owner_holds_up_nobody_though_its_child_lives(use_locks, owner, tmp_path):
    first = owner(use_locks, with_child=True)
    first.kill()
    first.join()
    begin = time.monotonic()
    lock = FolderLock(tmp_path, "--save")
    lock.acquire(use_locks=use_locks)
    assert time.monotonic() - begin < 1
    assert json.loads((tmp_path / OWNER).read_text())["process"] == os.getpid()
    lock.release()


@WAYS
def test_released_it_leaves_nothing_and_lets_the_next_one_in(use_locks, owner, tmp_path):
    lock = FolderLock(tmp_path, "--save", {})
    lock.acquire(use_locks=use_locks)
    assert set(json.loads((tmp_path / OWNER).read_text())) == {"host", "process", "since"}
    lock.release()
    assert list(tmp_path.iterdir()) == []
    owner(use_locks)


def test_an_owner_on_another_host_is_stale_after_a_minute_without_a_beat(tmp_path):
    path = tmp_path / OWNER
    path.write_text(json.dumps({"host": "elsewhere", "process": 1}))
    with pytest.raises(UserError, match=r"at work there \(host elsewhere, process 1\)"):
        FolderLock(tmp_path, "--log-dir").acquire(use_locks=False)
    os.utime(path, (time.time() - 61,) * 2)
    lock = FolderLock(tmp_path, "--log-dir")
    lock.acquire(use_locks=False)
    lock.release()


def test_a_file_that_was_not_finished_is_of_a_process_without_a_name(tmp_path):
    (tmp_path / OWNER).write_text('{"host": "he')
    with pytest.raises(UserError, match=r"at work there \(a process\)"):
        FolderLock(tmp_path, "--save").acquire(use_locks=False)
    lock = FolderLock(tmp_path, "--save")
    lock.acquire()
    lock.release()
