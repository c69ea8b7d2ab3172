"""What a checkpoint and the run that loads it must have in common."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peer_scale.checkpoints.manifest import Manifest
from peer_scale.checkpoints.parameters import shardings
from peer_scale.checkpoints.sections import Sections
from peer_scale.errors import UserError
from peer_scale.parallel.tensor_parallel import TensorParallel

_SECTIONS = ("model", "objective", "masking", "tokenizer", "data")
_SECTIONS_OF_WEIGHTS = ("model", "tokenizer")
# what of the model does not change what its weights mean
_OF_TRAINING = ("hidden_dropout", "attention_dropout", "init_std")


def check_identity(folder: Path, manifest: Manifest, own: Sections, tensor_parallel: TensorParallel) -> None:
    """Raise UserError naming every field in which the checkpoint and the run that `own` describes differ.

    Imported weights may go on with any data, dropout and objective whose model has the same parameters. The rule of the
    split may differ: `with_split_of` takes over the checkpoint's.
    """
    saved, here = manifest.sections.as_json(), own.as_json()
    if manifest.sections.imported is None:
        found = _differences(_of(saved, _SECTIONS), _of(here, _SECTIONS))
        differences = [difference for difference in found if difference[0] != "data.split"]
    else:
        for sections in (saved, here):
            sections["model"] = {key: value for key, value in sections["model"].items() if key not in _OF_TRAINING}
        differences = _differences(_of(saved, _SECTIONS_OF_WEIGHTS), _of(here, _SECTIONS_OF_WEIGHTS))
        if not differences:
            differences = _differences(_shapes(manifest), _model_shapes(own, tensor_parallel))
    if differences:
        told = "; ".join(f"{where} {saved} there, {here} here" for where, saved, here in differences)
        raise UserError(f"--load {folder}: saved by another run: {told}")


def with_split_of(manifest: Manifest, own: Sections) -> Sections:
    """Describe the run as `own` does, but with the split of the checkpoint that it goes on from, if that has seen data.

    Otherwise it would train on text that the checkpoint's run held out, and be validated on what that one has learned.
    """
    if manifest.sections.data is None or own.data is None:
        return own
    return replace(own, data=replace(own.data, split=manifest.sections.data.split))


def layout_changes(manifest: Manifest, own: Sections) -> str:
    """Say, for the user, in which parts of the layout the run differs from the one that saved; empty where in none."""
    differences = _differences(manifest.sections.as_json().get("layout"), own.as_json()["layout"])
    return ", ".join(f"{where} {saved} -> {here}" for where, saved, here in differences)


def _of(sections: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: sections.get(name) for name in names}


def _shapes(manifest: Manifest) -> dict[str, Any]:
    return {name: list(entry.shape) for name, entry in manifest.tensors.items()}


def _model_shapes(own: Sections, tensor_parallel: TensorParallel) -> dict[str, Any]:
    found = shardings(own.model, own.objective, tensor_parallel)
    return {name: list(sharding.shape) for name, sharding in found.items()}


def _differences(saved: Any, here: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(here, dict):
        keys = sorted({*saved, *here})
        return [d for key in keys for d in _differences(saved.get(key), here.get(key), f"{where}.{key}".lstrip("."))]
    here = json.loads(json.dumps(here))  # tuples are lists in a manifest
    saved = json.loads(json.dumps(saved))
    return [] if saved == here else [(where, saved, here)]
