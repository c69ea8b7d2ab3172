"""Where the sequences of a micro-batch lie among its tokens, which stand one after the other without any padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """B sequences of T tokens altogether.

    Attributes:
        lengths: how many tokens each has; on the host, so that no branch waits for the device.
        boundaries: int32 [B + 1], where each begins, and T.
        position_ids: int64 [T], each token's place in its sequence, from 0.
        sequence_ids: int64 [T], the number of each token's sequence, from 0.
    """

    lengths: tuple[int, ...]
    boundaries: Tensor
    position_ids: Tensor
    sequence_ids: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | None = None) -> Sequences:
        """Lay out sequences of these lengths."""
        counts = np.asarray(lengths, np.int64)
        boundaries = np.concatenate([[0], np.cumsum(counts)])
        sequence_ids = np.repeat(np.arange(len(counts)), counts)
        position_ids = np.arange(boundaries[-1]) - boundaries[:-1][sequence_ids]
        made = cls(
            tuple(counts.tolist()),
            torch.from_numpy(boundaries.astype(np.int32)),
            torch.from_numpy(position_ids),
            torch.from_numpy(sequence_ids),
        )
        return made if device is None else made.to(device)

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        """Length of the longest sequence."""
        return max(self.lengths)

    def to(self, device: torch.device) -> Sequences:
        """Give the same on `device`; the copy does not block the host."""
        return Sequences(self.lengths, *(tensor.to(device, non_blocking=True) for tensor in self._tensors))

    def pin_memory(self) -> Sequences:
        """Give the same in memory that a GPU copies from without the host (asked for by torch's data loader)."""
        return Sequences(self.lengths, *(tensor.pin_memory() for tensor in self._tensors))

    def of_each(self, sequence_ids: Tensor) -> tuple[Tensor, Tensor]:
        """List the tokens of the sequences that are asked for, by their numbers [n].

        Returns:
            int64 [n, L], L being the greatest length, and bool [n, L], False beyond a sequence's end, where the first
            is some token.
        """
        return tokens_of_each(sequence_ids, self.boundaries, self.max_length)

    @property
    def _tensors(self) -> list[Tensor]:
        return [getattr(self, each.name) for each in fields(self)[1:]]


def tokens_of_each(sequence_ids: Tensor, boundaries: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
    """Do as `Sequences.of_each` says, of sequences with these boundaries [B + 1] and this greatest length."""
    places = torch.arange(max_length, device=boundaries.device)
    begins, ends = boundaries[:-1].long()[sequence_ids], boundaries[1:].long()[sequence_ids]
    tokens = begins[:, None] + places
    is_inside = tokens < ends[:, None]
    return torch.where(is_inside, tokens, 0), is_inside
