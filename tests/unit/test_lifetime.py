"""Processes that end with the one that started them."""

import contextlib
import signal
import subprocess
import sys

import psutil
import pytest

from runs import PROJECT

CHILD = """
import os, signal, sys, time
from peer_scale.lifetime import end_with_parent, show_stacks_on_signal
show_stacks_on_signal()
end_with_parent(int(sys.argv[1]), signal.SIGKILL)
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())]).wait()
"""


@pytest.fixture
def family():
    command = [sys.executable, "-c", PARENT, CHILD]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT)
    child = psutil.Process(int(parent.stdout.readline()))
    yield parent, child
    for process in (parent, child):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    parent.communicate()


def test_a_child_ends_when_its_parent_is_killed(family):
    parent, child = family
    parent.kill()
    child.wait(timeout=10)


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    done = subprocess.run([sys.executable, "-c", CHILD, "1"], cwd=PROJECT, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL


def test_stacks_are_shown_and_the_process_goes_on(family):
    parent, child = family
    child.send_signal(signal.SIGUSR2)
    assert "most recent call first" in parent.stderr.readline()
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
