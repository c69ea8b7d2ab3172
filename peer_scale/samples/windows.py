"""Which tokens make up a sample: documents cut into windows, walked in a seeded order that needs no memory."""

import functools
from dataclasses import dataclass

import numpy as np

from peer_scale.corpus.store import TokenStore
from peer_scale.samples.split import Part
from peer_scale.seeds import stream_seed

_BLOCK = 128  # documents per row of the window table, whose lengths are read and added up for every sample
_BLOCKS_PER_READ = 8192  # while the table is made
_FEISTEL_ROUNDS = 6


class Windows:
    """Windows of at most `width` tokens within the documents of a part: every token of it is in exactly one.

    A document of n tokens gives ceil(n / width) windows of (nearly) equal length. Only the running count of windows at
    every 128th document is held, so a corpus of any size opens after one pass over the lengths in its index.

    Attributes:
        part: the text that is cut.
        num_tokens: tokens in all windows.
    """

    def __init__(self, store: TokenStore, part: Part, *, width: int) -> None:
        """Cut a part of a store's text.

        Raises:
            UserError: the index does not say where its documents lie.
        """
        self.part, self._store, self._width = part, store, width
        self.num_tokens = store.token_offset(part.last) - part.cut - store.token_offset(part.first) - part.skip
        counts = [self._block_counts(start) for start in range(part.first, part.last, _BLOCK * _BLOCKS_PER_READ)]
        self._ends = np.cumsum(np.concatenate(counts)) if counts else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def tokens(self, window: int, vocab_size: int) -> np.ndarray:
        """Read the tokens of one window, int64 [1..width], all of them below `vocab_size`.

        Raises:
            UserError: one is not; the message names file, document, position and id.
        """
        document, offset, length = self._place(window)
        tokens = self._store.read(document, offset, length)
        self._store.check_ids(tokens, vocab_size, document=document, offset=offset)
        return tokens

    def length_counts(self) -> np.ndarray:
        """Count the windows of each number of tokens, int64 [width + 1], by the index alone."""
        counts = np.zeros(self._width + 1, np.int64)
        for start in range(self.part.first, self.part.last, _BLOCK * _BLOCKS_PER_READ):
            lengths = self._lengths(start, _BLOCK * _BLOCKS_PER_READ)
            lengths = lengths[lengths > 0]
            windows = -(-lengths // self._width)
            shorter, longer_ones = np.divmod(lengths, windows)
            np.add.at(counts, shorter, windows - longer_ones)
            np.add.at(counts, np.minimum(shorter + 1, self._width), longer_ones)  # none where all have the width
        return counts

    def _place(self, window: int) -> tuple[int, int, int]:
        """Find the document of a window, its first token's position there, and how many tokens it has."""
        block = int(np.searchsorted(self._ends, window, side="right"))
        start = self.part.first + block * _BLOCK
        lengths = self._lengths(start, _BLOCK)
        ends = np.cumsum(-(-lengths // self._width))
        within = window - (int(self._ends[block - 1]) if block else 0)
        index = int(np.searchsorted(ends, within, side="right"))
        part = within - (int(ends[index - 1]) if index else 0)
        length = int(lengths[index])
        parts = -(-length // self._width)
        begin, end = length * part // parts, length * (part + 1) // parts
        document = start + index
        skipped = self.part.skip if document == self.part.first else 0
        return document, skipped + begin, end - begin

    def _lengths(self, start: int, count: int) -> np.ndarray:
        """Count the tokens in this part of each document from `start` on."""
        stop = min(start + count, self.part.last)
        lengths = self._store.document_lengths(start, stop)
        if start == self.part.first:
            lengths[0] -= self.part.skip
        if stop == self.part.last:
            lengths[-1] -= self.part.cut
        return lengths

    def _block_counts(self, start: int) -> np.ndarray:
        """Count the windows of each block of one read that begins at document `start`."""
        counts = -(-self._lengths(start, _BLOCK * _BLOCKS_PER_READ) // self._width)
        return np.add.reduceat(counts, np.arange(0, len(counts), _BLOCK))


@dataclass(frozen=True)
class SeededOrder:
    """Every number below `size` once per epoch, each epoch in an order of its own, computed number by number.

    A Feistel network on the next power of four, walked until it lands below `size`: a permutation without a table.
    """

    size: int
    seed: int

    def __getitem__(self, sample: int) -> int:
        epoch, index = divmod(sample, self.size)
        half_bits = max(1, (max(self.size - 1, 1).bit_length() + 1) // 2)
        keys = _round_keys(self.seed, epoch)
        while True:
            index = _feistel(index, half_bits, keys)
            if index < self.size:
                return index


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(stream_seed(seed, "order", epoch, round_) for round_ in range(_FEISTEL_ROUNDS))


def _feistel(index: int, half_bits: int, keys: tuple[int, ...]) -> int:
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
