"""A checkpoint's manifest as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peer_scale.checkpoints.manifest import KINDS, Manifest, TensorEntry
from peer_scale.checkpoints.sections import Sections

_NUMBER_BYTES = 4
_OF_START = ("commit", "dirty", "versions", "hosts", "world_size")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def listing(folder: Path, manifest: Manifest) -> str:
    """Tell the facts of the run, then one line per tensor; sizes are those of weight and moments together."""
    ties: dict[str, list[str]] = {}
    for tied, name in manifest.sections.ties.items():
        ties.setdefault(name, []).append(tied)
    rows: list[tuple[str, ...]] = [("tensor", "shape", "shards", "padding", "dtype", "size", "pieces", "tied with")]
    rows += [(name, *_columns(entry), ", ".join(ties.get(name, ()))) for name, entry in manifest.tensors.items()]
    files = sum(entry.bytes for entry in manifest.files.values())
    numbers = sum(math.prod(entry.shape) for entry in manifest.tensors.values())
    facts = [("checkpoint", str(folder)), *_facts(manifest.sections)]
    facts.append(("files", f"{len(manifest.files)}, {_size(files)}"))
    facts.append(("tensors", f"{len(manifest.tensors)}, {numbers:,} numbers, {len(KINDS)} kinds ({', '.join(KINDS)})"))
    return "\n".join([*_aligned(facts), "", *_aligned(rows)])


def _facts(sections: Sections) -> list[tuple[str, str]]:
    names = ("provenance", "saved by", "imported", "progress", "layout", "optimizer", "tokenizer", "data", "reshaped")
    values = sections.as_json()
    start = values["provenance"].pop("start") or {}
    values |= {"saved by": {name: value for name, value in start.items() if name in _OF_START}} if start else {}
    return [(name, _flat(values[name])) for name in names if name in values]


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _columns(entry: TensorEntry) -> tuple[str, ...]:
    split = "whole" if entry.shard_dim is None else f"{entry.shards} along {entry.shard_dim}"
    size = _size(_NUMBER_BYTES * len(KINDS) * math.prod(entry.shape))
    shape = " x ".join(map(str, entry.shape))
    return shape, split, str(entry.padding or ""), entry.dtype, size, str(len(entry.pieces))


def _size(number: float) -> str:
    unit = 0
    while number >= 1000 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {_UNITS[unit]}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
