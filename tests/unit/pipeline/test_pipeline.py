"""What the parity grid does not show of pipelines: the order that is run, ZeRO-3's corrections, fp16, failures."""

import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from peer_scale.errors import UserError
from peer_scale.pipeline.instructions import Backward, Forward
from peer_scale.pipeline.schedule import build_schedule
from peer_scale.pipeline.simulator import simulate
from peer_scale.pipeline.zero import Adaptation
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from peer_scale.training.job import place_stages
from runs import PROJECT, SMALL, corpus, ds_config, outside_of_ranks, torchrun, train_in_fp16, train_in_pool

pytestmark = pytest.mark.heavy

COMPUTE = (Forward, Backward)


def flags_for(tmp_path, text_file, *more, stage=2, name="log", **blocks):
    return [
        *(*corpus(text_file), "--log-dir", str(tmp_path / name)),
        *("--deepspeed_config", str(ds_config(tmp_path, stage, **blocks)), "--num-workers", "0"),
        *("--micro-batch-size", "2", "--global-batch-size", "8", "--warmup-epochs", "0.01", *map(str, more)),
    ]


def train_and_note_the_order(flags) -> list:
    from peer_scale.pipeline.runner import PipelineRunner

    done, original = [], PipelineRunner._do

    def noting(self, instruction, state):
        original(self, instruction, state)
        done.append(instruction)

    PipelineRunner._do = noting
    try:
        train_in_pool(flags)
    finally:
        PipelineRunner._do = original
    return done


def test_stages_run_what_the_simulator_runs(two_ranks, tmp_path, text_file):
    flags = flags_for(tmp_path, text_file, "--train-iters", 2, "--fp32", "--pipeline-model-parallel-size", 2)
    executed = two_ranks.run(train_and_note_the_order, flags)
    run = resolve(build_parser().parse_args([*SMALL, *flags]), world_size=2)
    schedule = build_schedule("two_pass", place_stages(run), 4)
    simulated = simulate(schedule)
    for stage, instructions in enumerate(executed):
        computed = [instruction for instruction in instructions if isinstance(instruction, COMPUTE)]
        wanted = [event.work for event in simulated.executed[stage]]
        assert len(wanted) >= 8
        assert computed == wanted * 2
        assert instructions == list(schedule.stages[stage]) * 2


def train_without(correction, flags):
    """The trainer with one of ZeRO's corrections taken out."""
    original = getattr(Adaptation, correction)
    setattr(Adaptation, correction, lambda self: None)
    try:
        return train_in_pool(flags)
    finally:
        setattr(Adaptation, correction, original)


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("stage", "offload", "correction"),
    [
        (3, False, "after_update"),
        (3, False, "before_backward"),
        *(
            pytest.param(stage, True, correction, marks=pytest.mark.slow)
            for stage, correction in ((2, "after_update"), (2, "before_update"), (3, "before_update"))
        ),
    ],
)
def test_zero_goes_wrong_without_each_of_its_corrections(stage, offload, correction, two_ranks, tmp_path, text_file):
    """If this fails, DeepSpeed has changed: see whether the correction is still needed, and still right."""
    more = ("--train-iters", 4, "--fp32", "--pipeline-model-parallel-size", 2)
    flags = flags_for(tmp_path, text_file, *more, stage=stage, **(dict(OFFLOAD) if offload else {}))
    right = [line["grad_norm"] for line in two_ranks.run(train_in_pool, flags)[0]]
    wrong = [line["grad_norm"] for line in two_ranks.run(train_without, correction, flags)[0]]
    assert wrong[1:] != pytest.approx(right[1:], rel=1e-4)


def test_what_a_deepspeed_version_lacks_is_named():
    optimizer = SimpleNamespace(micro_step_id=0)
    engine = SimpleNamespace(optimizer=optimizer, zero_optimization_stage=lambda: 3, zero_cpu_offload=lambda: False)
    with pytest.raises(RuntimeError, match=r"lacks optimizer.grad_partitions_flat_buffer, optimizer.parameter_offload"):
        Adaptation(engine, None)


def test_validation_is_that_of_one_rank(one_rank, two_ranks, tmp_path, text_file):
    common = ("--train-iters", 4, "--fp32", "--eval-interval", 2, "--eval-iters", 2)
    whole = one_rank.run(train_in_pool, flags_for(tmp_path, text_file, *common, name="whole"))[0]
    flags = flags_for(tmp_path, text_file, *common, "--pipeline-model-parallel-size", 2, name="stages")
    staged = two_ranks.run(train_in_pool, flags)[0]
    for one, other in zip(whole, staged, strict=True):
        keys = [key for key in one if key.startswith("validation_") and key.endswith("loss")]
        assert {key: other[key] for key in keys} == pytest.approx({key: one[key] for key in keys}, rel=1e-5)
    assert "validation_tqr_loss" in whole[1]


@pytest.mark.slow
def test_fp16_overflow_skips_the_step_on_every_stage(one_rank, two_ranks, tmp_path, text_file):
    fp16 = {"enabled": True, "initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 1000}
    more = ("--train-iters", 12)
    whole = one_rank.run(train_in_fp16, flags_for(tmp_path, text_file, *more, stage=3, name="one", fp16=fp16))[0]
    more = (*more, "--pipeline-model-parallel-size", 2)
    staged = two_ranks.run(train_in_fp16, flags_for(tmp_path, text_file, *more, stage=3, fp16=fp16))[0]
    scales = [line["loss_scale"] for line in staged]
    assert scales[0] > scales[-1] > 1, "the first steps overflow, then the scale stays"
    assert scales == [line["loss_scale"] for line in whole]
    assert [line["loss"] for line in staged] == pytest.approx([line["loss"] for line in whole], rel=2e-3)


def test_activation_checkpointing_and_dropout(two_ranks, tmp_path, text_file):
    common = ("--train-iters", 4, "--fp32", "--pipeline-model-parallel-size", 2)
    dropout = ("--hidden-dropout", 0.1, "--attention-dropout", 0.1)
    kept = two_ranks.run(train_in_pool, flags_for(tmp_path, text_file, *common, *dropout, name="kept"))[0]
    more = (*common, *dropout, "--activation-checkpointing")
    recomputed = two_ranks.run(train_in_pool, flags_for(tmp_path, text_file, *more, name="recomputed"))[0]
    assert [m["loss"] for m in recomputed] == pytest.approx([m["loss"] for m in kept], rel=1e-6)


def test_more_stages_than_work_are_refused():
    args = build_parser().parse_args(["--pipeline-model-parallel-size", "9"])
    with pytest.raises(UserError, match="stage"):
        place_stages(resolve(args, world_size=9))


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_job(victim, tmp_path, text_file):
    flags = flags_for(tmp_path, text_file, "--train-iters", 100_000, "--fp32", "--pipeline-model-parallel-size", 2)
    command = [sys.executable, *torchrun(2), str(PROJECT / "peer_scale/pretrain.py"), *SMALL, *flags]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=outside_of_ranks())
    try:
        metrics = tmp_path / "log" / "metrics.jsonl"
        deadline = time.monotonic() + 200
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline and job.poll() is None, "the job has not begun to train"
            time.sleep(0.1)
        ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(job.pid).children()}
        ranks[victim].send_signal(signal.SIGKILL)
        output, _ = job.communicate(timeout=60)
    finally:
        for process in (*psutil.Process(job.pid).children(), job) if job.poll() is None else ():
            process.kill()
    assert job.returncode != 0
    assert f"rank      : {victim}" in output and "SIGKILL" in output, output[-3000:]
    assert not any(child.is_running() for child in ranks.values())
