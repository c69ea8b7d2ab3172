"""Which tokens make up a sample: documents cut into windows, walked in a seeded order that needs no memory."""

from dataclasses import dataclass

import numpy as np

from peer_scale.corpus.store import TokenStore
from peer_scale.errors import UserError
from peer_scale.parallel.initialization import stream_seed

_BLOCK = 4096  # documents a row of the window table stands for
_FEISTEL_ROUNDS = 6


class Windows:
    """Windows of at most `width` tokens within documents [first, last): every token is in exactly one.

    A document of n tokens gives ceil(n / width) windows of (nearly) equal length. Only the running count of windows at
    every 4096th document is held, so a corpus of any size opens after one pass over the lengths in its index.
    """

    def __init__(self, store: TokenStore, *, width: int, first: int, last: int) -> None:
        self._store, self._width, self._first, self._last = store, width, first, last
        counts = [self._counts(start).sum() for start in range(first, last, _BLOCK)]
        self._ends = np.cumsum(np.array(counts, np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def tokens(self, window: int) -> np.ndarray:
        """Tokens of one window, int64 [1..width]."""
        block = int(np.searchsorted(self._ends, window, side="right"))
        start = self._first + block * _BLOCK
        lengths = self._lengths(start)
        ends = np.cumsum(-(-lengths // self._width))
        within = window - (int(self._ends[block - 1]) if block else 0)
        index = int(np.searchsorted(ends, within, side="right"))
        part = within - (int(ends[index - 1]) if index else 0)
        length = int(lengths[index])
        parts = -(-length // self._width)
        begin, end = length * part // parts, length * (part + 1) // parts
        return self._store.read(start + index, begin, end - begin)

    def _lengths(self, start: int) -> np.ndarray:
        return self._store.document_lengths(start, min(start + _BLOCK, self._last))

    def _counts(self, start: int) -> np.ndarray:
        return -(-self._lengths(start) // self._width)


@dataclass(frozen=True)
class SeededOrder:
    """Every number below `size` once an epoch, each epoch in an order of its own, computed number by number.

    A Feistel network on the next power of four, walked until it lands below `size`: a permutation without a table.
    """

    size: int
    seed: int

    def __getitem__(self, sample: int) -> int:
        epoch, index = divmod(sample, self.size)
        half_bits = max(1, (max(self.size - 1, 1).bit_length() + 1) // 2)
        keys = [stream_seed(self.seed, "order", epoch, round_) for round_ in range(_FEISTEL_ROUNDS)]
        while True:
            index = _feistel(index, half_bits, keys)
            if index < self.size:
                return index


def _feistel(index: int, half_bits: int, keys: list[int]) -> int:
    mask = (1 << half_bits) - 1
    left, right = index >> half_bits, index & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(value: int) -> int:
    """Scramble 64 bits (multiply and shift), so that each output bit depends on every input bit."""
    value &= 0xFFFFFFFFFFFFFFFF
    for factor in (0xD6E8FEB86659FD93, 0xA5A3564E27F8D1C5):
        value = ((value ^ (value >> 32)) * factor) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 32)


def split_documents(num_documents: int, validation_fraction: float) -> int:
    """Index of the first held-out document: the last `validation_fraction` of them, at least one if it is above 0."""
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction {validation_fraction}: it must be at least 0 and below 1")
    if validation_fraction == 0:
        return num_documents
    held_out = max(1, round(num_documents * validation_fraction))
    if held_out >= num_documents:
        raise UserError(
            f"the data has {num_documents} document(s), too few to hold {held_out} out for validation: "
            "give more text, or --validation-fraction 0"
        )
    return num_documents - held_out
