"""An experiment on a real Slurm cluster: it submits itself, and the jobs finish it."""

import json
import os
import subprocess
import sys
import time

import pytest

from runs import PROJECT
from slurm_cluster import missing_requirement, slurm_cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement())),
]
EXPERIMENT = """
name: queued
seeds: [1]
common:
  model: {vocab_size: 300}
  training: {seq_length: 16, global_batch_size: 4, micro_batch_size: 4}
  data: {data_path: [%s], cache_dir: %s, num_workers: 0}
  output: {eval_iters: 1}
arms: [{name: bert, model: bert-tiny, steps: 4}, {name: electra, model: electra-tiny, steps: 4}]
held_out: [{metric: validation_mlm_loss, higher_is_better: false}]
"""


def test_an_experiment_submits_itself_and_its_jobs_finish_it(text_file, tmp_path):
    file, output = tmp_path / "queued.yaml", tmp_path / "out"
    file.write_text(EXPERIMENT % (text_file, text_file.parent / "cache"))
    with slurm_cluster(num_nodes=1, cpus_per_node=2) as cluster:
        path = os.pathsep.join([os.path.dirname(sys.executable), cluster.environ["PATH"]])
        environment = {**cluster.environ, "PATH": path, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "peer_scale.cli", "experiment", str(file), "--output", str(output), "--slurm"]

        def submit():
            flags = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
            done = subprocess.run(command, check=False, **flags)
            assert done.returncode == 0, done.stderr
            return done.stdout.splitlines()

        assert [line.split(" job")[0] for line in submit()] == ["bert-s1: pre-training", "electra-s1: pre-training"]
        assert all("in the queue already" in line for line in submit())
        deadline = time.monotonic() + 240
        while (
            not (output / "results" / "electra-s1.json").exists() or not (output / "results" / "bert-s1.json").exists()
        ):
            outputs = [log.read_text()[-2000:] for log in output.rglob("slurm-*.out")]
            assert time.monotonic() < deadline, f"{outputs}\n{cluster.logs()}"
            time.sleep(0.5)
        while cluster.run("squeue", "--noheader").stdout.strip():
            assert time.monotonic() < deadline, "the last job goes on"
            time.sleep(0.2)
        comparison = json.loads((output / "experiment.json").read_text())
        assert comparison["missing"] == []
        assert [run["steps"] for arm in comparison["arms"] for run in arm["runs"]] == [4, 4]
        assert submit() == []  # nothing is left
