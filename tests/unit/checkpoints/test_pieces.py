"""Tensors cut for any ranks, written in pieces and put together again."""

import hashlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from peer_scale.checkpoints.manifest import KINDS, FileEntry, Piece, Sharding, TensorEntry, key_of
from peer_scale.checkpoints.pieces import TensorReader, write_tensors
from peer_scale.checkpoints.reshape import Cut


def random_tensors(cut, shapes, seed):
    """Logical tensors, where they are cut and their pieces, by means of torch's own functions."""
    generator = torch.Generator().manual_seed(seed)
    for name, (shape, dim) in shapes.items():
        entry = TensorEntry(shape, dim, 1, 0, ())
        sharding = cut.sharding(name, entry)
        wholes = [torch.randn(shape, generator=generator) for _ in KINDS]
        yield name, sharding, wholes, [shards_of(whole, sharding) for whole in wholes]


def shards_of(whole, sharding):
    padded = F.pad(whole, (0, 0) * (whole.ndim - 1) + (0, sharding.padding))
    return [padded] if sharding.dim is None else list(padded.chunk(sharding.count, sharding.dim))


SHAPES = {
    "embeddings.word.weight": ((37, 6), 0),
    "mlm_head.bias": ((37,), 0),
    "column.weight": ((24, 5), 0),
    "row.weight": ((7, 24), 1),
    "norm.weight": ((9,), None),
    "position.weight": ((5, 3), None),
}


@pytest.mark.parametrize("saved", [Cut(1, 1), Cut(2, 6), Cut(4, 4)])
def test_any_slice_of_any_cut(saved, tmp_path):
    tensors = {name: rest for name, *rest in random_tensors(saved, SHAPES, seed=saved.num_files)}
    pieces = {name: saved.pieces(sharding) for name, (sharding, *_) in tensors.items()}
    for file in {piece.file for found in pieces.values() for piece in found}:
        content = {
            key_of(kind, name): tensors[name][2][index][piece.shard].flatten()[piece.start :][: piece.length]
            for name, found in pieces.items()
            for piece in found
            for index, kind in enumerate(KINDS)
            if piece.file == file
        }
        entry = write_tensors(tmp_path / file, {key: (len(part),) for key, part in content.items()}, content.values())
        assert entry == FileEntry(
            (tmp_path / file).stat().st_size, hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
        )
        found = load_file(tmp_path / file)  # the library's own reader
        assert found.keys() == content.keys()
        assert all(torch.equal(found[key], content[key]) for key in content)
    entries = {
        name: TensorEntry(s.shape, s.dim, s.count, s.padding, tuple(pieces[name])) for name, (s, *_) in tensors.items()
    }
    assert all(entry.gap() is None for entry in entries.values())
    reader = TensorReader(tmp_path, entries)
    for name, (_, wholes, _) in tensors.items():
        for kind, whole in zip(KINDS, wholes, strict=True):
            assert torch.equal(reader.whole(name, kind), whole)
    for wanted, (name, (_, wholes, _)) in itertools.product((Cut(1, 3), Cut(2, 2), Cut(4, 8)), tensors.items()):
        target = wanted.sharding(name, entries[name])
        for shard, expected in enumerate(shards_of(wholes[1], target)):
            flat = expected.flatten()
            for start, end in itertools.combinations(range(0, len(flat) + 1, 5), 2):
                found = reader.flat(name, KINDS[1], target, shard, start, end - start)
                assert torch.equal(found, flat[start:end]), (name, wanted, shard, start, end)


def test_gaps_and_overlaps_are_told():
    def gap(*pieces, count=1):
        return TensorEntry((10,), 0, count, 0, tuple(Piece("f", *piece) for piece in pieces)).gap()

    assert gap((0, 0, 4), (0, 4, 6)) is None
    assert gap((0, 4, 6), (0, 0, 4)) is None
    assert gap((0, 0, 5), (1, 0, 5), count=2) is None
    assert gap((0, 0, 4), (0, 5, 5)) == "shard 0: f goes on from 5, not from 4"
    assert gap((0, 0, 5), (0, 4, 6)) == "shard 0: f goes on from 4, not from 5"
    assert gap((0, 0, 9)) == "shard 0: 9 of its 10 numbers are there"
    assert gap((0, 0, 5), count=2) == "shard 1: 0 of its 5 numbers are there"


def test_padding_is_not_stored():
    sharding = Sharding((37, 6), 0, 4, 27)  # 16 rows a shard
    assert [sharding.stored(shard) for shard in range(4)] == [16 * 6, 16 * 6, 5 * 6, 0]
