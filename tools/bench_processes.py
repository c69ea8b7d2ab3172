"""Peers in processes of their own, as they come: no allocator setting of ours, and threads of their own.

A process works only between a question and its answer, so that of both sides one works at a time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench_peers import MissingPeer, PaddedBatch, PeerStep
from bench_turns import Here, over_batches

_STEP, _MEMORY = "step", "memory"


class PeerProcess:
    """An action of another process, which is started by spawning: it shares nothing with this one.

    Args:
        build: makes the action there; a function of a module.
        arguments: of `build`.

    Raises:
        MissingPeer: there `build` raised it.
    """

    def __init__(self, build: Callable[..., Here], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, build, arguments), daemon=True)
        self._process.start()
        there.close()
        missing = self._answer()
        if missing is not None:
            self.close()
            raise MissingPeer(missing)

    def __call__(self) -> None:
        self._connection.send(_STEP)
        self._answer()

    def prepare(self) -> None:
        """Do nothing: the process waits for its turn."""

    def memory(self) -> int | None:
        self._connection.send(_MEMORY)
        return self._answer()

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the peer's process ended with {self._process.exitcode}") from None


def _serve(connection: Connection, build: Callable[..., Here], arguments: tuple[Any, ...]) -> None:
    try:
        action = build(*arguments)
    except MissingPeer as missing:
        connection.send(str(missing))
        return
    connection.send(None)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        answer = None
        if question == _MEMORY:
            answer = action.memory()
        else:
            action()
        connection.send(answer)


def peer_step(build: Callable[[], PeerStep], batches: Sequence[PaddedBatch], device: torch.device) -> PeerProcess:
    """Start a peer's step over batches in turns, with as many threads as this process has.

    Args:
        build: makes the step there; it is pickled.
        batches: what it works on.
        device: where they are put.
    """
    arrays = [[tensor.numpy(force=True) for tensor in batch] for batch in batches]
    return PeerProcess(_build_step, build, arrays, device, torch.get_num_threads())


def _build_step(build: Callable[[], PeerStep], arrays: list[list[Any]], device: torch.device, threads: int) -> Here:
    torch.set_num_threads(threads)
    batches = [PaddedBatch(*(torch.from_numpy(array).to(device) for array in batch)) for batch in arrays]
    return Here(over_batches(build(), batches), device)


def encode_batch(tokenizer: str, texts: Sequence[str], threads: int) -> PeerProcess:
    """Start `tokenizers`' own `encode_batch` over texts, a thousand at once."""
    return PeerProcess(_build_encode_batch, tokenizer, texts, threads)


def _build_encode_batch(content: str, texts: Sequence[str], threads: int) -> Here:
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": str(threads > 1).lower()}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    blocks = [list(texts[start : start + 1000]) for start in range(0, len(texts), 1000)]

    def encode() -> None:
        for block in blocks:
            tokenizer.encode_batch(block, add_special_tokens=False)

    return Here(encode, torch.device("cpu"))
