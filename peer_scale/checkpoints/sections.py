"""What a manifest says of the run, and how a run that loads it may differ."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from peer_scale.checkpoints.manifest import IMPORTED, Manifest
from peer_scale.errors import UserError
from peer_scale.objectives.objective import Objective
from peer_scale.parallel.topology import Topology
from peer_scale.settings.run import RunConfig

_RANDOM = (
    "no generator's state is kept: the order of the data, masking, sampling and initial weights are functions of the "
    "seed and a sample's number, dropout of (seed, step, micro-batch, data-parallel rank)"
)
# what of the model a run that starts from imported weights may choose
_OF_TRAINING = ("hidden_dropout", "attention_dropout", "init_std")
# what stands in two places of the model under one name
TIES = {"output matrix of mlm_head": "embeddings.word.weight"}


def identity(run: RunConfig, *, data_fingerprint: str, tokenizer_digest: str) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that loads it, by section."""
    return {
        "model": dataclasses.asdict(run.model),
        "objective": objective_section(run.objective),
        "masking": dataclasses.asdict(run.masking),
        "data": {
            "fingerprint": data_fingerprint,
            "tokenizer": tokenizer_digest,
            "seed": run.seed,
            "validation_fraction": run.data.validation_fraction,
            "seq_length": run.training.seq_length,
            "global_batch_size": run.training.global_batch_size,
        },
    }


def objective_section(objective: Objective) -> dict[str, Any]:
    """Describe an objective by its kind and its hyper-parameters."""
    return objective.section()


def layout(run: RunConfig, topology: Topology) -> dict[str, Any]:
    """How the ranks share the work; a run that loads the checkpoint may do otherwise."""
    return {
        "data_parallel": topology.size("dp"),
        "tensor_parallel": run.tensor_parallel,
        "pipeline_parallel": run.pipeline_parallel,
        "zero_stage": run.zero_stage,
        "precision": run.training.precision,
    }


def about(run: RunConfig) -> dict[str, Any]:
    """What is told of a run where its weights go on to, and may differ in a run that resumes it."""
    return {
        "provenance": {"model": run.name, "data_path": [str(path) for path in run.data.data_path]},
        "training": dataclasses.asdict(run.training),
        "random": {"seed": run.seed, "streams": _RANDOM},
        "ties": TIES,
    }


def check_identity(folder: Path, manifest: Manifest, run_identity: dict[str, Any]) -> None:
    """Raise UserError naming every field in which the checkpoint and the run differ.

    Imported weights may go on with any data, dropout and objective of as many levels.
    """
    if IMPORTED in manifest.sections:
        run_identity = _of_weights(run_identity)
        saved = _of_weights(manifest.sections)
    else:
        saved = manifest.sections
    found = {section: saved.get(section) for section in run_identity}
    differences = _differences(found, run_identity)
    if differences:
        told = "; ".join(f"{where} {saved} there, {here} here" for where, saved, here in differences)
        raise UserError(f"--load {folder}: saved by another run: {told}")


def _of_weights(sections: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {key: value for key, value in sections["model"].items() if key not in _OF_TRAINING},
        "objective": {"num_levels": sections["objective"]["num_levels"]},
        "data": {"tokenizer": sections["data"]["tokenizer"]},
    }


def layout_changes(manifest: Manifest, run_layout: dict[str, Any]) -> str:
    """In which parts of the layout the run differs from the one that saved, for the user; empty where in none."""
    differences = _differences(manifest.sections.get("layout"), run_layout)
    return ", ".join(f"{where} {saved} -> {here}" for where, saved, here in differences)


def _differences(saved: Any, here: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(here, dict):
        keys = sorted({*saved, *here})
        return [d for key in keys for d in _differences(saved.get(key), here.get(key), f"{where}.{key}".lstrip("."))]
    here = json.loads(json.dumps(here))  # tuples are lists in a manifest
    return [] if saved == here else [(where, saved, here)]
