"""From a span of tokens to a training example: two segments, the positions to corrupt, the numbers to sample with.

Everything here is a pure function of (seed, sample number, position), so any rank, worker or restart gives the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.samples.masking import MaskingConfig

NUM_SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]
_SINGLE_SEGMENT_SHARE = 0.1


class Batch(NamedTuple):
    """B examples of S positions, P of them (at most) selected for corruption."""

    input_ids: Tensor  # [B, S] the original tokens
    masked_ids: Tensor  # [B, S] with [MASK] at the selected positions
    token_types: Tensor  # [B, S] 0 for [CLS] A [SEP] and padding, 1 for B [SEP]
    attention_mask: Tensor  # [B, S] True but for padding
    positions: Tensor  # [B, P] the selected positions; 0 where fewer than P are
    is_selected: Tensor  # [B, P] False where `positions` only fills up
    uniforms: Tensor  # [B, P] fp32 in [0, 1), to sample the replacement with
    extra_uniforms: Tensor  # [B, P, N] likewise, as many per position as the objective asks for

    def to(self, device: torch.device) -> "Batch":
        """Give the batch on `device`; the copy does not block the host."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


@dataclass(frozen=True)
class ExampleBuilder:
    """Makes the example of one sample from its tokens."""

    tokenizer: WordPiece
    masking: MaskingConfig
    seq_length: int
    seed: int
    num_extra_uniforms: int = 0

    def build(self, tokens: np.ndarray, sample: int) -> tuple[np.ndarray, ...]:
        """Give the fields of `Batch` for one sample of at most seq_length - 3 tokens, in its order and without B."""
        per_position = 3 + self.num_extra_uniforms
        draws = sample_stream(self.seed, sample).random_raw(2 + per_position * self.seq_length)
        input_ids, token_types, length = self._segments(tokens, draws[:2])
        keys, mask_draws, uniform_draws, *extra_draws = np.split(draws[2:], per_position)
        extra = np.array(extra_draws, np.uint64).reshape(self.num_extra_uniforms, self.seq_length)
        positions = self._select(input_ids[:length], keys)
        width = self.masking.num_predictions(self.seq_length)
        padded = np.zeros(width, np.int64)
        padded[: len(positions)] = positions
        masked_ids = input_ids.copy()
        masked = positions[_unit(mask_draws[positions]) < self.masking.mask_probability]
        masked_ids[masked] = self.tokenizer.mask_id
        return (
            input_ids,
            masked_ids,
            token_types,
            np.arange(self.seq_length) < length,
            padded,
            np.arange(width) < len(positions),
            _unit(uniform_draws[padded]),
            _unit(extra[:, padded].T),
        )

    def stand_in(self, sample: int) -> tuple[np.ndarray, ...]:
        """Give the fields of `Batch` for a sample that cannot be made: one ordinary token."""
        ordinary = next(id_ for id_ in range(self.tokenizer.vocab_size) if id_ not in self._special_ids)
        return self.build(np.array([ordinary]), sample)

    @property
    def _special_ids(self) -> tuple[int, ...]:
        special = self.tokenizer
        return (special.cls_id, special.sep_id, special.pad_id, special.mask_id)

    def _segments(self, tokens: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """[CLS] A [SEP] B [SEP], cut at a word's beginning; one example in ten (or too short a text) has A alone."""
        special = self.tokenizer
        single, where = _unit(draws)
        starts = np.flatnonzero(special.starts_word[tokens][1:]) + 1
        if single < _SINGLE_SEGMENT_SHARE or not len(starts):
            parts = [[special.cls_id], tokens, [special.sep_id]]
            first_length = len(tokens) + 2
        else:
            cut = starts[int(where * len(starts))]
            parts = [[special.cls_id], tokens[:cut], [special.sep_id], tokens[cut:], [special.sep_id]]
            first_length = cut + 2
        content = np.concatenate([np.asarray(part, np.int64) for part in parts])
        input_ids = np.full(self.seq_length, special.pad_id, np.int64)
        input_ids[: len(content)] = content
        token_types = np.zeros(self.seq_length, np.int64)
        token_types[first_length : len(content)] = 1
        return input_ids, token_types, len(content)

    def _select(self, content: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Give the positions of the candidates with the smallest keys, ascending: a choice without replacement."""
        candidates = np.flatnonzero(~np.isin(content, self._special_ids))
        count = min(self.masking.num_predictions(len(content)), len(candidates))
        return np.sort(candidates[np.argsort(keys[candidates], kind="stable")[:count]])


def collate(examples: Sequence[tuple[np.ndarray, ...]]) -> Batch:
    """Stack examples along a new first dimension."""
    return Batch(*(torch.from_numpy(np.stack(field)) for field in zip(*examples, strict=True)))


def sample_stream(seed: int, sample: int) -> np.random.Philox:
    """Give the random numbers of one sample: a counter-based generator keyed by (seed, sample number)."""
    return np.random.Philox(key=np.array([seed, sample], np.uint64))


def _unit(raw: np.ndarray) -> np.ndarray:
    """Raw 64-bit numbers as fp32 in [0, 1): 24 bits, so that none rounds up to 1."""
    return ((raw >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)
