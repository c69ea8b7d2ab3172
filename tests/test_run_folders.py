"""A run has its folders for itself, survives the loss of its logs, and ends on Ctrl-C with all saved."""

import os
import shutil
import signal
import subprocess
import sys

import torch.distributed as dist

from checkpoint_runs import flags_for
from peer_scale.checkpoints.folder import newest
from peer_scale.pretrain import main
from runs import PROJECT, SMALL, outside_of_ranks, read_metrics, train_in_pool, train_to_refusal, wait_until


def test_a_run_that_is_joined_by_another_robbed_of_its_logs_and_interrupted(tmp_path, text_file, capfd):
    save, log = tmp_path / "save", tmp_path / "log"
    flags = [*SMALL, *flags_for(tmp_path, text_file, "log", "--save", save, "--num-workers", 1, steps=100_000)]
    process = subprocess.Popen(
        [sys.executable, PROJECT / "peer_scale/pretrain.py", *flags],
        **{"cwd": PROJECT, "env": outside_of_ranks(), "text": True, "start_new_session": True},
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE},
    )
    try:
        wait_until(lambda: (log / "metrics.jsonl").exists() and len(read_metrics(log)) > 2, process)

        if dist.is_initialized():
            dist.destroy_process_group()
        for other in (("--save", str(save), "--log-dir", str(tmp_path / "other")), ("--log-dir", str(log))):
            assert main([*flags[: flags.index("--log-dir")], "--num-workers", "0", *other]) == 2
            line = capfd.readouterr().err.splitlines()[-1]
            assert f"{other[0]} {other[1]}: another run is at work there (host" in line
            assert f"process {process.pid}, since" in line

        log.rename(tmp_path / "gone")  # at once: to delete a folder takes steps, between which the run may write
        shutil.rmtree(tmp_path / "gone")
        wait_until(lambda: (log / "metrics.jsonl").exists() and len(read_metrics(log)) > 2, process)
        os.killpg(process.pid, signal.SIGINT)  # as the terminal does: to the data worker too
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    step = newest(save)[1].sections.progress.step
    assert said.splitlines()[-1] == f"interrupted after step {step}: saved in {save}"
    assert "Traceback" not in said
    steps = [line["step"] for line in read_metrics(log)]
    assert steps == list(range(steps[0], step + 1))
    assert {path.name for path in save.iterdir()} == {"latest", f"step_{step:08d}"}


def test_what_is_done_is_done(one_rank, tmp_path, text_file):
    save = ("--save", tmp_path / "save", "--micro-batch-size", 4)
    first = one_rank.run(train_in_pool, flags_for(tmp_path, text_file, "log", *save))[0]
    assert one_rank.run(train_in_pool, flags_for(tmp_path, text_file, "log", *save))[0] == first
    refusal = one_rank.run(train_to_refusal, flags_for(tmp_path, text_file, "log", *save, steps=3))[0]
    there = tmp_path / "save/step_00000004"
    assert refusal == f"--train-iters 3: {there} is of step 4 already; give more steps"
    more = one_rank.run(train_in_pool, flags_for(tmp_path, text_file, "log", *save, steps=6))[0]
    assert [line["step"] for line in more] == [1, 2, 3, 4, 5, 6] and more[:4] == first


def test_weights_begin_a_run_with_a_fresh_optimizer_on_any_ranks(one_rank, two_ranks, tmp_path, text_file):
    begin = ("--save", tmp_path / "first", "--micro-batch-size", 4)
    one_rank.run(train_in_pool, flags_for(tmp_path, text_file, "first-log", *begin))
    curves = []
    for pool, name in ((one_rank, "a"), (two_ranks, "b")):
        flags = ("--init-from", tmp_path / "first", "--save", tmp_path / name, "--seed", 7, "--fp32")
        flags += ("--hidden-dropout", 0, "--attention-dropout", 0)
        curves.append(pool.run(train_in_pool, flags_for(tmp_path, text_file, f"{name}-log", *flags, stage=3))[0])
        sections = newest(tmp_path / name)[1].sections
        assert sections.optimizer.updates == 4 and sections.progress.step == 4
    assert [line["step"] for line in curves[0]] == [1, 2, 3, 4]
    for one, two in zip(*curves, strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-5 * one["loss"]
