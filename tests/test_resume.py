"""Resuming equals never having stopped."""

import contextlib
import json
import signal
import subprocess
import sys

import psutil
import pytest

from checkpoint_runs import without_times
from runs import PROJECT, SMALL, corpus, ds_config, pretrain, read_metrics, torchrun, train_in_pool, wait_until


def flags_for(folder, text_file, stage, log_dir, *more):
    return [
        *(*corpus(text_file), "--deepspeed_config", ds_config(folder, stage)),
        *("--train-iters", 20, "--global-batch-size", 8, "--micro-batch-size", 2, "--fp32", "--num-threads", 1),
        *("--hidden-dropout", 0.1, "--attention-dropout", 0.1, "--warmup-epochs", 0.05, "--log-dir", folder / log_dir),
        *more,
    ]


def start(flags, ranks):
    command = [sys.executable, *torchrun(ranks), str(PROJECT / "peer_scale/pretrain.py"), *SMALL, *map(str, flags)]
    return subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE)


def kill_after_step(process, log_dir, step):
    metrics = log_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= step, process)
    for victim in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage, two_ranks, tmp_path, text_file):
    whole = two_ranks.run(train_in_pool, list(map(str, flags_for(tmp_path, text_file, stage, "whole"))))[0]

    killed = flags_for(tmp_path, text_file, stage, "cut", "--save", tmp_path / "save", "--save-interval", 10)
    process = start(killed, ranks=2)
    kill_after_step(process, tmp_path / "cut", 12)
    (tmp_path / "save" / ".writing_step_00000099").mkdir()

    resumed = pretrain(*killed, "--load", tmp_path / "save", "--num-workers", 3, launcher=torchrun(2))
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 10" in resumed.stdout
    metrics = read_metrics(tmp_path / "cut")
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert without_times(metrics) == without_times(whole)
    assert not list((tmp_path / "save").glob(".writing*"))
    assert (tmp_path / "save" / "latest").read_text() == "step_00000020"


def test_stopping_on_a_signal_saves_and_keeps_the_last_checkpoints(tmp_path, text_file):
    flags = flags_for(
        tmp_path, text_file, 2, "log", "--save", tmp_path / "save", "--save-interval", 2, "--keep-last", 2
    )
    flags[flags.index("--train-iters") + 1] = 100_000
    process = start([*flags, "--exit-signal-handler"], ranks=2)
    wait_until((tmp_path / "save" / "step_00000006").exists, process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both ranks
    process.wait(60)
    kept = sorted(path.name for path in (tmp_path / "save").glob("step_*"))
    assert len(kept) == 2
    last_step = read_metrics(tmp_path / "log")[-1]["step"]
    assert kept[-1] == f"step_{last_step:08d}"
    manifest = json.loads((tmp_path / "save" / kept[-1] / "peer_scale.json").read_text())
    assert manifest["progress"]["step"] == last_step


def test_exit_duration_stops_both_ranks_after_one_step(two_ranks, tmp_path, text_file):
    flags = flags_for(tmp_path, text_file, 2, "log", "--exit-duration-in-mins", 0)
    metrics = two_ranks.run(train_in_pool, list(map(str, flags)))[0]
    assert len(metrics) < 5
