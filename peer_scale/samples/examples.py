"""From a span of tokens to a training example: two segments, the positions to corrupt, the numbers to sample with.

Everything here is a pure function of (seed, sample number, position), so any rank, worker or restart gives the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peer_scale.corpus.wordpiece import WordPiece
from peer_scale.samples.masking import MaskingConfig
from peer_scale.sequences import Sequences

NUM_SPECIAL_TOKENS = 3  # [CLS] A [SEP] B [SEP]
_SINGLE_SEGMENT_SHARE = 0.1
_MOST_IDS_OF_16_BITS = 1 << 15  # signed: torch computes little with unsigned ones


class Example(NamedTuple):
    """A sequence of L tokens, n of them selected for corruption."""

    input_ids: np.ndarray  # [L] the original tokens
    masked_ids: np.ndarray  # [L] with [MASK] at the selected positions
    token_types: np.ndarray  # [L] 0 for [CLS] A [SEP], 1 for B [SEP]
    positions: np.ndarray  # [n] the selected positions, ascending
    uniforms: np.ndarray  # [n] fp32 in [0, 1), to sample the replacement with
    extra_uniforms: np.ndarray  # [n, N] likewise, as many per position as the objective asks for


class Batch(NamedTuple):
    """The T tokens of several examples, one example after the other, n of the tokens selected for corruption.

    Until it is brought to a device its whole numbers are as narrow as may be, since there they are only carried.
    """

    input_ids: Tensor  # [T] the original tokens
    masked_ids: Tensor  # [T] with [MASK] at the selected positions
    token_types: Tensor  # [T] 0 for [CLS] A [SEP], 1 for B [SEP]
    positions: Tensor  # [n] where among the T tokens the selected ones are, ascending
    uniforms: Tensor  # [n] fp32 in [0, 1), to sample the replacement with
    extra_uniforms: Tensor  # [n, N] likewise, as many per position as the objective asks for
    sequences: Sequences  # which of the T tokens belong together
    selected: Sequences  # which of the n selected ones do

    def to(self, device: torch.device) -> "Batch":
        """Give the batch on `device`, whole numbers as int64; the copy does not block the host."""
        # widened where it arrives: torch would do both at once on the host, and wait
        return Batch(
            self.input_ids.to(device, non_blocking=True).long(),
            self.masked_ids.to(device, non_blocking=True).long(),
            self.token_types.to(device, non_blocking=True).long(),
            self.positions.to(device, non_blocking=True).long(),
            self.uniforms.to(device, non_blocking=True),
            self.extra_uniforms.to(device, non_blocking=True),
            self.sequences.to(device),
            self.selected.to(device),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Go from a worker to the training process as arrays through the pipe.

        Tensors would go by shared memory: slower for such small ones, with an open file for each as long as it waits,
        and containers often have little of it.
        """
        *tensors, sequences, selected = self
        return _arrived, ([tensor.numpy() for tensor in tensors], sequences.lengths, selected.lengths)


def _arrived(arrays: Sequence[np.ndarray], lengths: Sequence[int], selected: Sequence[int]) -> Batch:
    return Batch._make([*map(torch.from_numpy, arrays), Sequences.of(lengths), Sequences.of(selected)])


@dataclass(frozen=True)
class ExampleBuilder:
    """Makes the example of one sample from its tokens."""

    tokenizer: WordPiece
    masking: MaskingConfig
    seq_length: int
    seed: int
    num_extra_uniforms: int = 0

    def build(self, tokens: np.ndarray, sample: int) -> Example:
        """Make the example of one sample of at most seq_length - 3 tokens."""
        per_position = 3 + self.num_extra_uniforms
        draws = sample_stream(self.seed, sample).random_raw(2 + per_position * self.seq_length)
        input_ids, token_types = self._segments(tokens, draws[:2])
        keys, mask_draws, uniform_draws, *extra_draws = np.split(draws[2:], per_position)
        extra = np.array(extra_draws, np.uint64).reshape(self.num_extra_uniforms, self.seq_length)
        positions = self._select(input_ids, keys)
        masked_ids = input_ids.copy()
        masked = positions[_unit(mask_draws[positions]) < self.masking.mask_probability]
        masked_ids[masked] = self.tokenizer.mask_id
        uniforms, extra_uniforms = _unit(uniform_draws[positions]), _unit(extra[:, positions].T)
        return Example(input_ids, masked_ids, token_types, positions, uniforms, extra_uniforms)

    def stand_in(self, sample: int) -> Example:
        """Make an example of one ordinary token, for a sample that cannot be made."""
        ordinary = next(id_ for id_ in range(self.tokenizer.vocab_size) if id_ not in self._special_ids)
        return self.build(np.array([ordinary]), sample)

    @property
    def _special_ids(self) -> tuple[int, ...]:
        special = self.tokenizer
        return (special.cls_id, special.sep_id, special.pad_id, special.mask_id)

    def _segments(self, tokens: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
        dtype = np.int16 if special.vocab_size <= _MOST_IDS_OF_16_BITS else np.int32
        input_ids = np.concatenate([np.asarray(part, dtype) for part in parts])
        return input_ids, (np.arange(len(input_ids)) >= first_length).astype(np.int8)

    def _select(self, content: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Give the positions of the candidates with the smallest keys, ascending: a choice without replacement."""
        candidates = np.flatnonzero(~np.isin(content, self._special_ids))
        count = min(self.masking.num_predictions(len(content)), len(candidates))
        return np.sort(candidates[np.argsort(keys[candidates], kind="stable")[:count]])


def collate(examples: Sequence[Example]) -> Batch:
    """Put examples one after the other, the longest first: those of like length are neighbours then."""
    examples = sorted(examples, key=lambda example: -len(example.input_ids))
    sequences = Sequences.of([len(example.input_ids) for example in examples])
    selected = Sequences.of([len(example.positions) for example in examples])
    fields = [torch.from_numpy(np.concatenate(field)) for field in zip(*examples, strict=True)]
    input_ids, masked_ids, token_types, places, uniforms, extra_uniforms = fields
    positions = (places + sequences.boundaries[:-1][selected.sequence_ids]).int()
    return Batch(input_ids, masked_ids, token_types, positions, uniforms, extra_uniforms, sequences, selected)


def sample_stream(seed: int, sample: int) -> np.random.Philox:
    """Give the random numbers of one sample: a counter-based generator keyed by (seed, sample number)."""
    return np.random.Philox(key=np.array([seed, sample], np.uint64))


def _unit(raw: np.ndarray) -> np.ndarray:
    """Raw 64-bit numbers as fp32 in [0, 1): 24 bits, so that none rounds up to 1."""
    return ((raw >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24)
