"""Real ranks over gloo, started once and given one function after another.

To import torch, DeepSpeed and megatron-core costs more than most tests. One process of the test session does it
(multiprocessing's fork server), and every rank is a fork of that, which takes milliseconds.
"""

import contextlib
import gc
import importlib
import multiprocessing
import multiprocessing.context
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

_MAX_THREADS = 80
"""Of a rank: a fresh one has about ten, a run leaves up to twelve behind."""


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time; the message has every rank's log."""


class RankPool:
    """A group of ranks: `run` calls a function on all of them and gives their results in rank order."""

    def __init__(self, world_size: int, threads: int = 1) -> None:
        self.world_size = world_size
        self._threads = threads
        self._processes: list = []

    def __enter__(self) -> "RankPool":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, function, *args, timeout: float = 300, **kwargs) -> list:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__name__, args, kwargs))
        try:
            return self._collect(time.monotonic() + timeout)
        except RankFailure:
            self._stop()  # the others may wait for the failed one for ever
            raise

    def _collect(self, deadline: float) -> list:
        results: list = [None] * self.world_size
        waiting = set(range(self.world_size))
        while waiting:
            for rank in sorted(waiting):
                if self._pipes[rank].poll(0.02):
                    try:
                        ok, value = self._pipes[rank].recv()
                    except EOFError:
                        raise self._failure(f"rank {rank} died") from None
                    if not ok:
                        raise self._failure(f"rank {rank} raised:\n{value}")
                    results[rank] = value
                    waiting.discard(rank)
                elif not self._processes[rank].is_alive():
                    raise self._failure(f"rank {rank} died with exit code {self._processes[rank].exitcode}")
            if time.monotonic() > deadline:
                raise self._failure(f"no answer from rank(s) {sorted(waiting)} in time")
        return results

    def _failure(self, what: str) -> RankFailure:
        logs = "".join(f"\n--- log of rank {r}\n{log.read_text()[-4000:]}" for r, log in enumerate(self._logs))
        return RankFailure(what + logs)

    def _start(self) -> None:
        context = fork_server()
        folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        port = free_port()
        self._logs = [folder / f"rank{rank}.log" for rank in range(self.world_size)]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank, log in enumerate(self._logs):
            log.touch()
            ours, theirs = context.Pipe()
            settings = (theirs, rank, self.world_size, port, str(log), self._threads)
            process = context.Process(target=_serve, args=settings)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _stop(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        self._processes = []

    def renew(self) -> None:
        """End the ranks where earlier runs have left them many threads; the next call starts new ones."""
        if self._processes and psutil.Process(self._processes[0].pid).num_threads() > _MAX_THREADS:
            self._stop()


class RankPools:
    """Groups of ranks by their size, each started when it is first asked for and kept to the end of the session."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._pools: dict[int, RankPool] = {}

    def __enter__(self) -> "RankPools":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def of(self, world_size: int) -> RankPool:
        """Give the group of so many ranks."""
        if world_size not in self._pools:
            self._pools[world_size] = self._stack.enter_context(RankPool(world_size))
        return self._pools[world_size]

    def renew(self) -> None:
        """Let no group grow old: to be called between tests."""
        for pool in self._pools.values():
            pool.renew()


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Give what starts processes as forks of the one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peer_scale.training.job"])
    return context


def become_rank(rank: int, world_size: int, port: int, log: str) -> None:
    """Tell this process what a launcher tells a rank, and send all that it says to the end of `log`."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # What was imported stays: the collector need not look at half a million objects, which takes half a second.
    gc.freeze()


def free_port() -> int:
    """Below the range from which outgoing connections take theirs: those could have it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _serve(pipe: Connection, rank: int, world_size: int, port: int, log: str, threads: int) -> None:
    become_rank(rank, world_size, port, log)
    from peer_scale.quiet import silence_libraries

    silence_libraries()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    dist.init_process_group("gloo")
    while (message := pipe.recv()) is not None:
        module, name, args, kwargs = message
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        _end_groups_of_runs()
    dist.destroy_process_group()


def _end_groups_of_runs() -> None:
    """End all groups that runs have made, but those that DeepSpeed keeps for itself.

    gloo has threads for each, one of which wakes up a hundred times per second: after a hundred runs they would need
    all of the machine. DeepSpeed holds on to some engines and so to their groups, for which `RankPool.renew` is there.
    """
    import deepspeed.utils.groups
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    kept = {id(value) for value in vars(deepspeed.utils.groups).values()} | {id(dist.group.WORLD)}
    for group in [group for group in _world.pg_map if id(group) not in kept]:
        dist.destroy_process_group(group)
    gc.collect()
