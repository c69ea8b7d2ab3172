"""What lies in examples/ works as it lies there."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from runs import PROJECT, SMALL, corpus

EXAMPLES = PROJECT / "examples"


def test_the_model_of_own_sizes_is_taken():
    args = build_parser().parse_args(["--model", "peer-small", "--config", str(EXAMPLES / "small_model.yaml")])
    run = resolve(args, 1)
    assert (run.model.ranker.num_layers, run.model.generator.num_layers, run.model.num_shared_layers) == (6, 4, 2)
    assert (run.objective.num_levels, run.training.train_iters) == (4, 50_000)


def test_the_settings_of_the_first_run_are_there_for_other_data():
    flags = ["--model", "peer-tiny", "--config", str(EXAMPLES / "mini.yaml")]
    in_file, first = (resolve(build_parser().parse_args(each), 1) for each in (flags, []))
    assert in_file == first


@pytest.mark.slow
def test_from_own_text_to_a_model_in_transformers(text_file, tmp_path):
    """The shell script twice, the second time with more steps, then the Python script on what it has exported."""
    command = tmp_path / "peer-scale"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m peer_scale.cli "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}
    folder = tmp_path / "run"
    for steps in ("2", "3"):
        flags = ["--train-iters", steps, *SMALL, *corpus(text_file)[2:]]
        script = ["bash", str(EXAMPLES / "own_text.sh"), str(text_file), str(folder), *flags]
        subprocess.run(script, env=environment, cwd=tmp_path, check=True, timeout=240)
    steps = [json.loads(line)["step"] for line in (folder / "logs/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    marked = _script("mark_replaced").replaced_probabilities(str(folder / "hf"), "The file is read.")
    assert [token for token, _ in marked][-1] == "."
    assert all(0 < probability < 1 for _, probability in marked)


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
