"""A checkpoint of step 0 of given weights, in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from peer_scale.checkpoints.folder import CheckpointFolder, committed
from peer_scale.checkpoints.manifest import KINDS, WEIGHT, Manifest, Piece, Sharding, TensorEntry, key_of
from peer_scale.checkpoints.pieces import write_tensors, write_tokenizer
from peer_scale.checkpoints.sections import Sections
from peer_scale.corpus.wordpiece import WordPiece

_FILE = "rank_00000.safetensors"


def write_initial(
    output: Path,
    sections: Sections,
    shardings: Mapping[str, Sharding],
    weight: Callable[[str], Tensor],
    tokenizer: WordPiece,
) -> tuple[Path, Manifest]:
    """Write a checkpoint with moments of zero; one tensor at a time is in memory.

    Args:
        output: the folder of checkpoints.
        sections: what the manifest says.
        shardings: each parameter's, one shard of all of it.
        weight: gives a parameter's weight in its logical shape.
        tokenizer: whose ids the embeddings are for.

    Returns:
        The checkpoint's own folder, and its manifest.

    Raises:
        OSError: the disk does.
    """
    checkpoints = CheckpointFolder(output, keep_last=1)
    aside = checkpoints.begin(0)

    def tensors() -> Iterator[Tensor]:
        for name in shardings:
            for kind in KINDS:
                yield weight(name).flatten() if kind == WEIGHT else torch.zeros(lengths[name])

    lengths = {name: sharding.stored(0) for name, sharding in shardings.items()}
    shapes = {key_of(kind, name): (length,) for name, length in lengths.items() for kind in KINDS}
    files = {_FILE: write_tensors(aside / _FILE, shapes, tensors()), **write_tokenizer(aside, tokenizer)}
    entries = {
        name: TensorEntry(s.shape, s.dim, s.count, s.padding, (Piece(_FILE, 0, 0, lengths[name]),))
        for name, s in shardings.items()
    }
    manifest = Manifest(sections, entries, files)
    checkpoints.commit(0, manifest)
    (step,) = committed(output)
    return step, manifest
