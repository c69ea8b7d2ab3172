"""Micro-batches written down as rows of equal length, and what the model gets of them: no padding."""

from typing import NamedTuple

import torch
from torch import Tensor

from peer_scale.samples.examples import Batch
from peer_scale.sequences import Sequences


class Rows(NamedTuple):
    """B rows of S tokens with P slots for selected positions, not all of which count."""

    input_ids: Tensor  # [B, S]
    masked_ids: Tensor  # [B, S]
    token_types: Tensor  # [B, S]
    is_token: Tensor  # [B, S] False on padding, which comes last
    positions: Tensor  # [B, P]
    is_selected: Tensor  # [B, P] False on slots that are not used, which come last
    uniforms: Tensor  # [B, P]
    extra_uniforms: Tensor  # [B, P, N]

    def part(self, rows: slice) -> "Rows":
        return Rows(*(field[rows] for field in self))

    def batch(self) -> Batch:
        sequences = Sequences.of(self.is_token.sum(1).tolist())
        selected = Sequences.of(self.is_selected.sum(1).tolist())
        begins = sequences.boundaries[:-1].long()[selected.sequence_ids]
        return Batch(
            self.input_ids[self.is_token],
            self.masked_ids[self.is_token],
            self.token_types[self.is_token],
            begins + self.positions[self.is_selected],
            self.uniforms[self.is_selected],
            self.extra_uniforms[self.is_selected],
            sequences,
            selected,
        )


def rows_of(batch: Batch, pad_id: int = 0) -> Rows:
    """Pad a micro-batch to its longest sequence."""
    sequences, selected = batch.sequences, batch.selected
    where = sequences.sequence_ids, sequences.position_ids
    slots = selected.sequence_ids, selected.position_ids

    def pad(values: Tensor, index: tuple[Tensor, Tensor], width: int, fill: int | bool = 0) -> Tensor:
        padded = values.new_full((len(sequences.lengths), width, *values.shape[1:]), fill)
        padded[index] = values
        return padded

    length, width = sequences.max_length, selected.max_length
    return Rows(
        pad(batch.input_ids, where, length, pad_id),
        pad(batch.masked_ids, where, length, pad_id),
        pad(batch.token_types, where, length),
        pad(torch.ones_like(batch.input_ids, dtype=torch.bool), where, length),
        pad(sequences.position_ids[batch.positions], slots, width),
        pad(torch.ones_like(batch.positions, dtype=torch.bool), slots, width),
        pad(batch.uniforms, slots, width),
        pad(batch.extra_uniforms, slots, width),
    )
