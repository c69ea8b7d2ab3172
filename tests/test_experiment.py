"""A whole experiment through its command: killed twice on the way, it comes out as the one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from runs import PROJECT, TIMES

EXPERIMENT = """
name: tiny
seeds: [1]
budget: {flops: 1.6e8}
common:
  model: {vocab_size: 300}
  training: {seq_length: 16, global_batch_size: 4, micro_batch_size: 4}
  data: {data_path: [%s], cache_dir: %s, num_workers: 0}
  output: {eval_iters: 1, eval_interval: 10, save_interval: 2}
arms:
  - {name: bert, model: bert-tiny, changes: {model: %s}}
  - {name: peer, model: peer-tiny, changes: {model: %s}}
tasks: [{name: parity, path: %s}]
finetune: {options: {recipe: electra, epochs: 1, lr: 1.0e-3, seeds: [1, 2], max_length: 16}}
held_out: [{metric: validation_mlm_loss, higher_is_better: false}]
"""
ONE = "{num_layers: 1, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2}"
UNEQUAL = ("wall_s", "time_s", *TIMES)


@pytest.fixture
def start():
    """Start the command; what still runs at the end of the test, because that failed, is ended."""
    started = []
    yield lambda *arguments: started.append(_started(*arguments)) or started[-1]
    for process in started:
        process.terminate()


def _started(file, output, *flags):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "peer_scale.cli", "experiment", str(file), "--output", str(output), *flags]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


def wait_for_file(folder, pattern, process):
    deadline = time.monotonic() + 240
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in UNEQUAL and key != "provenance"}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def write_files(tmp_path, text_file):
    task = tmp_path / "parity"
    task.mkdir()
    told = {"name": "parity", "kind": "classification", "metric": "accuracy", "columns": ["text"], "label": "label"}
    (task / "task.json").write_text(json.dumps(told))
    rows = [f"{'return the value' if n % 2 else 'open a file'} {n}\t{n % 2}" for n in range(40)]
    for split in ("train", "dev", "test"):
        (task / f"{split}.tsv").write_text("text\tlabel\n" + "\n".join(rows) + "\n")
    shared = f"{{generator: {ONE}, embedding_size: 16, vocab_size: 300"
    file = tmp_path / "tiny.yaml"
    peer = f"{shared}, ranker: {ONE}, num_shared_layers: 0}}"
    file.write_text(EXPERIMENT % (text_file, text_file.parent / "cache", f"{shared}}}", peer, task))
    return file


@pytest.mark.slow
def test_killed_twice_it_comes_out_as_if_left_alone(start, text_file, tmp_path):
    file = write_files(tmp_path, text_file)
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    first = start(file, broken, "--only", "peer-s1")
    wait_for_file(broken, "runs/peer-s1/checkpoints/step_*", first)
    first.kill()
    first.communicate()
    assert not (broken / "results" / "peer-s1.json").exists()

    second = start(file, broken, "--only", "peer-s1")
    wait_for_file(broken, "runs/peer-s1/measures/*/*/parity/runs/seed1*.json", second)
    second.send_signal(signal.SIGTERM)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 75, f"{out}\n{err}"
    assert err.splitlines()[-1] == "stopped; what was running has been saved: the same command goes on"

    third = start(file, broken, "--jobs", "2")
    alone = start(file, whole, "--only", "peer-s1")  # meanwhile: the run that was hit by both, left alone
    printed = finish(third)
    comparison = json.loads((broken / "experiment.json").read_text())
    assert comparison["missing"] == []
    assert comparison["sentence"] in printed
    assert [(t["a"], t["b"]) for t in comparison["tests"] if t["measure"] == "finetune-all/parity"] == [
        ("bert", "peer")
    ]
    flops = [run["flops_paper"] for arm in comparison["arms"] for run in arm["runs"]]
    assert len(flops) == 2
    a_step = [run["flops_paper"] / run["steps"] for arm in comparison["arms"] for run in arm["runs"]]
    assert all(1.6e8 - step < found <= 1.6e8 for step, found in zip(a_step, flops, strict=True))

    finish(alone)
    results = [json.loads((folder / "results" / "peer-s1.json").read_text()) for folder in (broken, whole)]
    assert results[0]["scores"]["finetune-all/parity"] is not None
    assert without_times(results[0]) == without_times(results[1])
    # nothing is done again
    before = (broken / "results" / "peer-s1.json").stat().st_mtime_ns
    assert "done" not in finish(start(file, broken))
    assert (broken / "results" / "peer-s1.json").stat().st_mtime_ns == before
