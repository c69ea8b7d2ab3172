"""Pre-training runs of an experiment: the trainer in a process of its own, started again until it is done."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_scale
from peer_scale.checkpoints.folder import committed, newest, step_of
from peer_scale.errors import STOPPED_EXIT_CODE, DamagedError
from peer_scale.experiments.curves import Curve, read_curve
from peer_scale.experiments.plan import ArmPlan
from peer_scale.experiments.processes import ProgramError, Programs, command, last_line
from peer_scale.settings import yaml_text
from peer_scale.storage import write_atomically

TRAINER = Path(peer_scale.__file__).with_name("pretrain.py")
_FRUITLESS_STARTS = 3  # in a row that end early without a further checkpoint


@dataclass(frozen=True)
class RunFolder:
    """Where one run's files are."""

    path: Path

    @property
    def settings(self) -> Path:
        """The trainer's --config."""
        return self.path / "settings.yaml"

    @property
    def save(self) -> Path:
        """The trainer's --save."""
        return self.path / "checkpoints"

    @property
    def log_dir(self) -> Path:
        """The trainer's --log-dir."""
        return self.path / "log"

    @property
    def output(self) -> Path:
        """What the programs of the run print."""
        return self.path / "output.txt"

    def model(self, step: int) -> Path:
        """The model of one checkpoint as transformers opens it."""
        return self.path / "models" / f"step_{step:08d}"

    def measures(self, step: int) -> Path:
        """Fine-tunings and probes of one checkpoint."""
        return self.path / "measures" / f"step_{step:08d}"

    @property
    def saved_step(self) -> int:
        """The step of the last checkpoint; 0 where there is none."""
        return max(map(step_of, committed(self.save)), default=0)


def trainer_flags(folder: RunFolder, plan: ArmPlan, seed: int) -> list[str]:
    """Write the run's settings, and give the flags with which the trainer takes them."""
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.settings, yaml_text.dump(plan.settings_of(seed)).encode())
    return ["--config", str(folder.settings), "--save", str(folder.save), "--log-dir", str(folder.log_dir)]


def pretrain(folder: RunFolder, plan: ArmPlan, seed: int, programs: Programs, launcher: Sequence[str]) -> None:
    """Train to the last step, from the last checkpoint where there is one; ProgramError where that fails."""
    if is_pretrained(folder, plan):
        return
    flags = trainer_flags(folder, plan, seed)
    starts = launcher or (sys.executable,)
    fruitless = 0
    while True:
        before = folder.saved_step
        code = programs.run([*starts, TRAINER, *flags], folder.output)
        if not code:
            return
        fruitless = 0 if folder.saved_step > before else fruitless + 1
        if code != STOPPED_EXIT_CODE or programs.stopping or fruitless == _FRUITLESS_STARTS:
            raise ProgramError(f"exit code {code}: {last_line(folder.output)} (all of it: {folder.output})")


def is_pretrained(folder: RunFolder, plan: ArmPlan) -> bool:
    """Say whether the last step is saved."""
    return folder.saved_step == plan.measured_steps[-1]


def convert(folder: RunFolder, step: int, branch: str | None, programs: Programs) -> Path:
    """Write the checkpoint of a step as transformers opens it, where that is not done; give the folder."""
    model = folder.model(step)
    if not model.exists():
        model.parent.mkdir(exist_ok=True)
        checkpoint = folder.save / f"step_{step:08d}"
        chosen = [] if branch is None else ["--branch", branch]
        programs.check(command("convert", "to-hf", "--load", checkpoint, "--output", model, *chosen), folder.output)
    return model


def curve_of(folder: RunFolder) -> Curve:
    """Read what pre-training reported."""
    return read_curve(folder.log_dir / "metrics.jsonl", _num_devices(folder))


def provenance_of(folder: RunFolder) -> dict[str, Any]:
    """Say what the run was made with; text and tokenizer by their digests."""
    found = newest(folder.save)
    sections = found[1].sections if found else None
    versions = {"peer_scale": peer_scale.__version__, "python": platform.python_version()}
    return {
        "data_fingerprint": sections.data.fingerprint if sections and sections.data else None,
        "tokenizer_digest": sections.tokenizer.digest if sections else None,
        "versions": versions,
        "host": platform.node(),
    }


def _num_devices(folder: RunFolder) -> int:
    """Count the ranks that wrote the last checkpoint."""
    try:
        found = newest(folder.save)
    except DamagedError:
        found = None
    layout = found[1].sections.layout if found else None
    return layout.data_parallel * layout.tensor_parallel * layout.pipeline_parallel if layout else 1
