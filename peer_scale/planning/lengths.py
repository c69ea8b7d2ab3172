"""How long a run's samples are, by which its time, its traffic and its memory go."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from peer_scale.errors import UserError
from peer_scale.objectives.graph import SampleSize
from peer_scale.samples.examples import NUM_SPECIAL_TOKENS
from peer_scale.samples.masking import MaskingConfig
from peer_scale.samples.windows import Windows


@dataclass(frozen=True)
class Lengths:
    """How many samples have each number of tokens, the special ones included.

    Attributes:
        counts: `counts[n]` samples have n tokens.
        are_known: False where only the mean is, so that nothing can be said of the longest.
    """

    counts: tuple[int, ...]
    are_known: bool = True

    @classmethod
    def at_fill(cls, fill: float, seq_length: int) -> Lengths:
        """Take all samples to have the length at which padded ones would be filled so far.

        Raises:
            UserError: No sample is so short.
        """
        tokens = round(fill * seq_length)
        if not NUM_SPECIAL_TOKENS < tokens <= seq_length:
            raise UserError(
                f"--fill {fill:g}: of --seq-length {seq_length} that is {tokens} tokens, but a sample has "
                f"{NUM_SPECIAL_TOKENS + 1} to {seq_length}"
            )
        return cls((0,) * tokens + (1,), are_known=False)

    @classmethod
    def of_text(cls, windows: Windows) -> Lengths:
        """Count the samples that are made of a text; each as if it had two segments, as nine in ten have."""
        return cls((0,) * NUM_SPECIAL_TOKENS + tuple(windows.length_counts().tolist()))

    def mean_size(self, masking: MaskingConfig) -> SampleSize:
        """Give the means over all samples."""
        selected = [masking.num_predictions(int(length)) for length in self._lengths]
        return SampleSize(self._mean(self._lengths), self._mean(selected), self._mean(self._lengths**2))

    def draw(self, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        """Draw samples with replacement; their tokens, int64 of that shape."""
        return random.choice(self._lengths, shape, p=self._shares)

    def most_tokens(self, samples: float, chance: float) -> float:
        """Give an upper bound of the tokens that `samples` drawn ones have together, exceeded by at most that chance.

        It is Chernoff's, and never above what they have when all are the longest: any exponent gives a valid bound, of
        which the best of many is taken.
        """
        longest = int(self._lengths[-1])
        exponents = np.geomspace(1e-4, 1e3, 400)[:, None] / longest
        moments = (self._shares * np.exp(exponents * (self._lengths - longest))).sum(1)
        bounds = samples * longest + (samples * np.log(moments) - np.log(chance)) / exponents[:, 0]
        return float(min(samples * longest, bounds.min()))

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.flatnonzero(self.counts)

    @cached_property
    def _shares(self) -> np.ndarray:
        counts = np.array(self.counts, np.float64)[self._lengths]
        return counts / counts.sum()

    def _mean(self, values: np.ndarray | list[int]) -> float:
        return float(self._shares @ values)
