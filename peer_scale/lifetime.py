"""Processes that end with the one that started them, and show where they are when asked."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Looked up here, not in a forked process: another thread may have held the loader's lock at the moment of the fork.
_prctl = ctypes.CDLL(None).prctl if sys.platform.startswith("linux") else None


def end_with_parent(parent: int, number: signal.Signals) -> None:
    """Have Linux send this process a signal when its parent dies, even by SIGKILL; elsewhere nothing is changed.

    Args:
        parent: process id of the parent, as the caller knows it: where it is gone already, the signal comes at once.
        number: SIGKILL, or SIGTERM where there is something to save.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def show_stacks_on_signal() -> None:
    """Write the stack of each thread to stderr at SIGUSR2, and go on."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)
