"""Results of finished runs: a small file for each, which may come from another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peer_scale.errors import UserError
from peer_scale.experiments.plan import Plan, RunName
from peer_scale.storage import write_atomically

FOLDER = "results"


@dataclass(frozen=True)
class RunResult:
    """All that is kept of one run.

    Attributes:
        experiment: the name of the experiment that it was made for.
        arm: its arm.
        seed: of pre-training.
        fingerprint: of its settings, as in the plan.
        steps: optimizer steps; 0 where nothing was trained.
        tokens: trained on, padding left out.
        flops_paper: of pre-training, in the paper's accounting.
        flops_actual: of pre-training, the matrix products that were run.
        wall_s: seconds of training steps, without starts and interruptions.
        curve: points over pre-training.
        held_out: metrics of the last step, validation included.
        scores: by measure, those of tasks from 0 to 1.
        details: what the scores were made of, and the scores at earlier checkpoints.
        provenance: text, tokenizer, versions, host.
    """

    experiment: str
    arm: str
    seed: int
    fingerprint: str
    steps: int = 0
    tokens: int = 0
    flops_paper: float = 0.0
    flops_actual: float = 0.0
    wall_s: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float | None] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> RunName:
        """Which run it is."""
        return RunName(self.arm, self.seed)


def write_result(folder: Path, result: RunResult) -> None:
    """Write the file of one run, whole or not at all."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(result), indent=1, allow_nan=False)
    write_atomically(folder / FOLDER / f"{result.name}.json", content.encode())


def read_results(folder: Path, plan: Plan) -> dict[RunName, RunResult]:
    """Read what there is of the plan's runs; other files are another experiment's and are left alone.

    Raises:
        UserError: a file cannot be read, is of other settings than the plan's, or two are of different texts.
    """
    results = {}
    for run in plan.runs:
        path = folder / FOLDER / f"{run}.json"
        if not path.exists():
            continue
        result = _read(path)
        if result.name != run:
            raise UserError(f"{path}: holds the result of {result.name}")
        if result.fingerprint != plan.arms[run.arm].fingerprint:
            raise UserError(
                f"{path}: made with other settings of arm {run.arm} (steps, model, objective or training) than the "
                "experiment's file has now; move it away to run it again"
            )
        results[run] = result
    _require_same_text(results, plan, folder)
    return results


def _read(path: Path) -> RunResult:
    try:
        return RunResult(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is no result of a run: {error}") from None


def _require_same_text(results: Mapping[RunName, RunResult], plan: Plan, folder: Path) -> None:
    """Raise UserError where runs with the same settings of the text have seen different texts, as on two machines."""
    first: dict[str, tuple[RunName, str]] = {}
    for run, result in results.items():
        settings = plan.arms[run.arm].settings or {}
        said = json.dumps([settings.get("data"), (settings.get("model") or {}).get("vocab_size")], sort_keys=True)
        found = result.provenance.get("data_fingerprint")
        if found is not None and first.setdefault(said, (run, found))[1] != found:
            raise UserError(f"{folder / FOLDER}: {first[said][0]} and {run} were pre-trained on different texts")
