import os
import subprocess
import sys
import time
from pathlib import Path

from peer_scale.corpus.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from peer_scale.corpus.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1] + ".done").touch()
"""
COUNT = """
import os, sys
from pathlib import Path
from peer_scale.corpus.locks import locked
folder = Path(sys.argv[1])
for _ in range(50):
    with locked(str(folder / "lock")):
        os.mkdir(folder / "inside")  # an error where another is inside
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
        os.rmdir(folder / "inside")
"""


def start_holder(path: Path, seconds: float) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_process_waits_until_the_other_is_done(tmp_path):
    path = tmp_path / "lock"
    with start_holder(path, 0.5) as holder:
        with locked(str(path)):
            assert sorted(os.listdir(tmp_path)) == ["lock", "lock.done"]
        assert holder.wait() == 0
    assert os.listdir(tmp_path) == ["lock.done"]


def test_a_killed_process_gives_the_lock_back_and_the_file_it_leaves_does_no_harm(tmp_path):
    path = tmp_path / "lock"
    with start_holder(path, 60) as holder:
        holder.kill()
        holder.wait()
    assert path.exists()
    started = time.monotonic()
    with locked(str(path)):
        assert time.monotonic() - started < 10
    assert os.listdir(tmp_path) == []


def test_no_two_of_several_processes_are_inside_at_once(tmp_path):
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "150"
    assert os.listdir(tmp_path) == ["count"]
