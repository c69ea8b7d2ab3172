"""Worker processes that never outlive the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Open a process pool whose workers end at once when the block raises or this process dies, even by SIGKILL.

    Workers are spawned, not forked (the caller may hold threads), and leave Ctrl-C and the signals of clusters to the
    caller.

    Args:
        workers: number of processes, at least 1.
    """
    context = multiprocessing.get_context("spawn")
    # Only this process holds the writing end, so a worker reads the end of file when it is gone.
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent, initargs=(lifeline,))
    try:
        yield pool
    except BaseException:
        held.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held.close()
        lifeline.close()


def _follow_parent(lifeline: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_at_end_of_file, args=(lifeline,), daemon=True).start()


def _exit_at_end_of_file(lifeline: Connection) -> None:
    try:
        lifeline.recv()
    except EOFError:
        os._exit(1)
