import fcntl
import os
import struct
import subprocess
import sys
import termios

import pytest

from peer_scale.corpus.progress import PreparationBar

SHOW = """
from peer_scale.corpus.progress import PreparationBar
with PreparationBar(True, 4_000_000) as bar:
    bar.add(1000, 1_000_000)
    bar.add(234, 1_000_000)
"""


@pytest.mark.parametrize(("total_bytes", "expected"), [(4_000_000, " 50%|"), (None, "tokenising: 2.00MB ")])
def test_in_a_file_the_last_state_is_a_line_of_its_own(capfd, total_bytes, expected):
    with PreparationBar(True, total_bytes) as bar:
        bar.add(1000, 1_000_000)
        bar.add(234, 1_000_000)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "\r" not in captured.err
    assert captured.err.isascii()
    *_, last = captured.err.splitlines()
    assert len(captured.err.splitlines()) == 2  # the first and the last state: ten seconds have not passed
    assert expected in last
    assert "1,234 documents" in last


def test_nothing_is_shown_where_nothing_is_asked_for(capfd):
    with PreparationBar(False, 100) as bar:
        bar.add(1, 100)
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_one_line_is_drawn_anew():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    subprocess.run([sys.executable, "-c", SHOW], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert text.count("\n") == 1
    assert "1,234 documents" in text.split("\r")[-2]
    assert " 50%|" in text.split("\r")[-2]
