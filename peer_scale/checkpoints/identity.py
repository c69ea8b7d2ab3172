"""What a checkpoint and the run that loads it must have in common."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from peer_scale.checkpoints.manifest import Manifest
from peer_scale.checkpoints.parameters import shardings
from peer_scale.checkpoints.sections import Sections
from peer_scale.checkpoints.upgrade import with_blocks
from peer_scale.errors import UserError
from peer_scale.parallel.tensor_parallel import TensorParallel

_SECTIONS = ("model", "objective", "masking", "tokenizer", "data")
_SECTIONS_OF_WEIGHTS = ("model", "tokenizer")
_SPLIT = "data.split"  # is taken over by the run that goes on: `with_split_of`
# what of the model does not change what its weights mean
_OF_TRAINING = (
    *("hidden_dropout", "attention_dropout"),
    *("init_std", "depth_scaled_init", "width_scaled_init", "unigram_output_bias"),
)


def differences_of_weights(manifest: Manifest, own: Sections, tensor_parallel: TensorParallel) -> str:
    """Say why the checkpoint's weights cannot begin the run that `own` describes; empty where they can.

    It may have other data, dropout and objective, if its model has the same parameters.
    """
    saved, here = manifest.sections.as_json(), own.as_json()
    for sections in (saved, here):
        sections["model"] = {key: value for key, value in sections["model"].items() if key not in _OF_TRAINING}
    found = _differences(_of(saved, _SECTIONS_OF_WEIGHTS), _of(here, _SECTIONS_OF_WEIGHTS))
    return _told(found or _differences(_shapes(manifest), _model_shapes(own, tensor_parallel)))


def differences(manifest: Manifest, own: Sections, tensor_parallel: TensorParallel) -> str:
    """Say why the run that `own` describes cannot go on from the checkpoint; empty where it can."""
    if manifest.sections.imported is None:
        return differences_of_identities(_of(manifest.sections.as_json(), _SECTIONS), own)
    return differences_of_weights(manifest, own, tensor_parallel)


def check_identity(folder: Path, manifest: Manifest, own: Sections, tensor_parallel: TensorParallel) -> None:
    """Raise UserError naming every field in which the checkpoint and the run that `own` describes differ."""
    told = differences(manifest, own, tensor_parallel)
    if told:
        raise UserError(f"--load {folder}: saved by another run: {told}")


def with_split_of(manifest: Manifest, own: Sections) -> Sections:
    """Describe the run as `own` does, but with the split of the checkpoint that it goes on from, if that has seen data.

    Otherwise it would train on text that the checkpoint's run held out, and be validated on what that one has learned.
    """
    if manifest.sections.data is None or own.data is None:
        return own
    return replace(own, data=replace(own.data, split=manifest.sections.data.split))


def identity_of(own: Sections) -> dict[str, Any]:
    """Give what makes a run itself, ready for JSON."""
    return _of(own.as_json(), _SECTIONS)


def differences_of_identities(saved: dict[str, Any], own: Sections) -> str:
    """Say in which fields an `identity_of` and that of the run that `own` describes differ; empty where in none."""
    found = _differences(with_blocks(saved), identity_of(own))
    return _told([difference for difference in found if difference[0] != _SPLIT])


def changes(manifest: Manifest, own: Sections) -> str:
    """Say, for the user, what of layout and training differs from the run that saved; empty where nothing does."""
    saved, here = manifest.sections.as_json(), own.as_json()
    names = [name for name in ("layout", "training") if saved.get(name) is not None]
    # a setting that the version which saved did not know has not changed
    known = {name: {key: value for key, value in here[name].items() if key in saved[name]} for name in names}
    found = [difference for name in names for difference in _differences(saved[name], known[name])]
    return ", ".join(f"{where} {saved} -> {here}" for where, saved, here in found)


def _told(differences: list[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{where} {saved} there, {here} here" for where, saved, here in differences)


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
