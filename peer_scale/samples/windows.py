"""Which tokens make up a sample: documents cut into windows, walked in a seeded order that needs no memory."""

import functools
from dataclasses import dataclass

import numpy as np

from peer_scale.corpus.store import TokenStore
from peer_scale.samples.split import Part
from peer_scale.seeds import stream_seed

_BLOCK = 32  # documents per row of the window table, whose lengths are read to find a window
_BLOCKS_PER_READ = 8192  # while the table is made
_FEISTEL_ROUNDS = 6


class Windows:
    """Windows of at most `width` tokens within the documents of a part: every token of it is in exactly one.

    A document of n tokens gives ceil(n / width) windows of (nearly) equal length. Only the running count of windows at
    every 32nd document is held, so a corpus of any size opens after one pass over the lengths in its index.

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
        self._begin = store.token_offset(part.first) + part.skip
        self.num_tokens = store.token_offset(part.last) - part.cut - self._begin
        counts = [self._block_counts(start) for start in range(part.first, part.last, _BLOCK * _BLOCKS_PER_READ)]
        self._ends = np.cumsum(np.concatenate(counts)) if counts else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def tokens(self, window: int, vocab_size: int) -> np.ndarray:
        """Read the tokens of one window, int64 [1..width], all of them below `vocab_size`.

        Raises:
            UserError: one is not; the message names file, document, position and id.
        """
        document, offset, length = (int(found[0]) for found in self._places(np.array([window])))
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

    def lengths(self, windows: np.ndarray) -> np.ndarray:
        """Count the tokens of any windows, int64 [n], by the index alone."""
        return self._places(windows)[2]

    def _places(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find for any windows the document, the first token's position there, and how many tokens it is; int64 [n]."""
        blocks = np.unique(np.searchsorted(self._ends, windows, side="right"))
        lengths = self._block_lengths(blocks)
        counts = -(-lengths // self._width)
        before = self._ends[blocks] - counts.sum(1)
        ends = (before[:, None] + np.cumsum(counts, axis=1)).ravel()  # ascending, over blocks that are left out too
        index = np.searchsorted(ends, windows, side="right")
        length, parts = lengths.ravel()[index], counts.ravel()[index]
        part = windows - ends[index] + parts
        begin, end = length * part // parts, length * (part + 1) // parts
        document = self.part.first + blocks[index // _BLOCK] * _BLOCK + index % _BLOCK
        return document, begin + np.where(document == self.part.first, self.part.skip, 0), end - begin

    def _block_lengths(self, blocks: np.ndarray) -> np.ndarray:
        """Count the tokens in this part of each document of the blocks, int64 [blocks, 32]; 0 after the last one."""
        bounds = self.part.first + blocks[:, None] * _BLOCK + np.arange(_BLOCK + 1)
        offsets = self._store.token_offsets(np.minimum(bounds, self.part.last))
        return np.diff(np.clip(offsets, self._begin, self._begin + self.num_tokens))

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
        return int(self.at(np.array([sample]))[0])

    def at(self, samples: np.ndarray) -> np.ndarray:
        """Give the numbers that any samples have, int64 [n]."""
        epochs, indices = np.divmod(samples, self.size)
        found = np.empty(samples.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            left = np.flatnonzero(epochs == epoch)
            found[left] = self._walk(indices[left].astype(np.uint64), _round_keys(self.seed, epoch))
        return found

    def _walk(self, indices: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        half_bits = max(1, (max(self.size - 1, 1).bit_length() + 1) // 2)
        left = np.arange(len(indices))
        while len(left):
            indices[left] = _feistel(indices[left], half_bits, keys)
            left = left[indices[left] >= self.size]
        return indices


@functools.lru_cache(maxsize=4)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(stream_seed(seed, "order", epoch, round_) for round_ in range(_FEISTEL_ROUNDS))


def _feistel(indices: np.ndarray, half_bits: int, keys: tuple[int, ...]) -> np.ndarray:
    mask = (1 << half_bits) - 1
    left, right = indices >> half_bits, indices & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half_bits) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (multiply and shift), so that each output bit depends on every input bit; uint64."""
    for factor in (0xD6E8FEB86659FD93, 0xA5A3564E27F8D1C5):
        values = (values ^ (values >> 32)) * factor
    return values ^ (values >> 32)
