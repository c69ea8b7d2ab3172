"""Resuming equals never having stopped."""

import json
import signal

import pytest

from checkpoint_runs import without_times
from forked_ranks import ForkedRanks
from runs import corpus, ds_config, read_metrics, train_in_pool, train_to_refusal


def flags_for(folder, text_file, stage, log_dir, *more):
    return [
        *(*corpus(text_file), "--deepspeed_config", ds_config(folder, stage)),
        *("--train-iters", 20, "--global-batch-size", 8, "--micro-batch-size", 2, "--fp32", "--num-threads", 1),
        *("--hidden-dropout", 0.1, "--attention-dropout", 0.1, "--warmup-epochs", 0.05, "--log-dir", folder / log_dir),
        *("--num-workers", 0),
        *more,
    ]


def steps_in(log_dir):
    file = log_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0  # the last line may be half written


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(stage, two_ranks, tmp_path, text_file):
    whole = two_ranks.run(train_in_pool, list(map(str, flags_for(tmp_path, text_file, stage, "whole"))))[0]

    killed = flags_for(tmp_path, text_file, stage, "cut", "--save", tmp_path / "save", "--save-interval", 10)
    ranks = ForkedRanks(killed, 2, tmp_path)
    ranks.wait_until(lambda: steps_in(tmp_path / "cut") >= 12)
    ranks.kill()
    (tmp_path / "save" / ".writing_step_00000099").mkdir()

    resumed = ForkedRanks([*killed, "--load", tmp_path / "save", "--num-workers", 1], 2, tmp_path)
    assert resumed.end() == [0, 0], resumed.said
    assert "after step 10" in resumed.said[0]
    metrics = read_metrics(tmp_path / "cut")
    assert [line["step"] for line in metrics] == list(range(1, 21))
    assert without_times(metrics) == without_times(whole)
    assert not list((tmp_path / "save").glob(".writing*"))
    assert (tmp_path / "save" / "latest").read_text() == "step_00000020"


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(two_ranks, tmp_path, text_file):
    def flags(*more):
        saving = ("--save", tmp_path / "save", "--save-interval", 2, "--keep-last", 9)
        return list(map(str, flags_for(tmp_path, text_file, 2, "log", *saving, *more)))

    def flip(folder):
        shard = tmp_path / "save" / folder / "rank_00001.safetensors"
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)

    whole = two_ranks.run(train_in_pool, [*flags(), "--train-iters", "8"])[0]
    flip("step_00000008")
    manifest = tmp_path / "save" / "step_00000006" / "peer_scale.json"
    manifest.write_text(manifest.read_text()[:-40])
    refused = two_ranks.run(train_to_refusal, [*flags("--strict-load"), "--train-iters", "8"])
    assert "step_00000006/peer_scale.json: not a checkpoint's manifest" in refused[0] == refused[1]
    again = two_ranks.run(train_in_pool, [*flags(), "--train-iters", "8"])[0]
    assert without_times(again) == without_times(whole)
    names = sorted(path.name for path in (tmp_path / "save").iterdir() if "step" in path.name)
    kept = ["step_00000002", "step_00000004", "step_00000006", "step_00000008"]
    assert names == [".damaged_step_00000006", ".damaged_step_00000008", *kept]

    for folder in kept:
        flip(folder)
    assert "step_00000002" in two_ranks.run(train_to_refusal, [*flags(), "--train-iters", "9"])[1]
    assert (tmp_path / "save" / "step_00000002").exists(), "the last one is not put aside"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_stopping_on_a_signal_saves_and_keeps_the_last_checkpoints(tmp_path, text_file, number):
    flags = flags_for(
        tmp_path, text_file, 2, "log", "--save", tmp_path / "save", "--save-interval", 2, "--keep-last", 2
    )
    flags[flags.index("--train-iters") + 1] = 100_000
    ranks = ForkedRanks(flags, 2, tmp_path)
    ranks.wait_until((tmp_path / "save" / "step_00000006").exists)
    ranks.signal(number)
    assert ranks.end() == [75, 75], ranks.said
    assert "the same command goes on" in ranks.said[0]
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
