"""bf16 follows fp32; fp16's scaler, overflows and skipped steps."""

import pytest

from peer_scale.errors import TrainingError
from runs import corpus, ds_config, train_in_fp16, train_in_pool


def flags_for(tmp_path, text_file, name, *more):
    return [
        *(*corpus(text_file), "--log-dir", str(tmp_path / name)),
        *("--micro-batch-size", "4", "--global-batch-size", "8", *map(str, more)),
    ]


def mean_loss(metrics, last=20):
    return sum(line["loss"] for line in metrics[-last:]) / last


@pytest.mark.parametrize(
    ("model", "stage", "more"),
    [
        ("peer", 3, ()),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("peer", 1, ()),
                ("peer", 2, ()),
                ("teams", 2, ("--tensor-model-parallel-size", 2)),
                ("teams", 3, ("--pipeline-model-parallel-size", 2)),
            )
        ),
    ],
)
def test_bf16_trains_under_every_stage(model, stage, more, two_ranks, tmp_path, text_file):
    losses = {}
    for precision in ("fp32", "bf16"):
        common = ("--model", f"{model}-tiny", "--seq-length", 32, "--train-iters", 20, *more)
        config = ("--deepspeed_config", ds_config(tmp_path, stage))
        flags = flags_for(tmp_path, text_file, precision, f"--{precision}", *common, *config)
        losses[precision] = two_ranks.run(train_in_pool, flags)[0]
    for single, half in zip(losses["fp32"], losses["bf16"], strict=True):
        assert half["loss"] == pytest.approx(single["loss"], rel=0.02)


@pytest.mark.slow
def test_bf16_stays_within_2_percent_of_fp32_after_200_steps(one_rank, tmp_path, text_file):
    means = {}
    for precision in ("fp32", "bf16"):
        flags = flags_for(tmp_path, text_file, precision, f"--{precision}", "--train-iters", 200)
        flags[flags.index("--micro-batch-size") + 1] = "8"
        means[precision] = mean_loss(one_rank.run(train_in_pool, flags)[0])
    assert means["bf16"] == pytest.approx(means["fp32"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_fp16_lowers_its_scale_until_steps_are_taken(stage, two_ranks, tmp_path, text_file):
    fp16 = {"enabled": True, "initial_scale_power": 14, "hysteresis": 1, "loss_scale_window": 1000}
    config = ds_config(tmp_path, stage, fp16=fp16)
    metrics = two_ranks.run(
        train_in_fp16, flags_for(tmp_path, text_file, "fp16", "--train-iters", 14, "--deepspeed_config", config)
    )[0]
    scales = [line["loss_scale"] for line in metrics]
    assert scales[0] > scales[-1] > 1, "the first steps overflow, then the scale stays"
    assert scales[-1] == scales[-3]
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert metrics[-1]["grad_norm"] > 0


@pytest.mark.slow
def test_fp16_gives_up_after_its_budget_of_skipped_steps(one_rank, tmp_path, text_file):
    fp16 = {"enabled": True, "initial_scale_power": 60, "hysteresis": 1}
    config = ds_config(tmp_path, 2, fp16=fp16)
    flags = flags_for(tmp_path, text_file, "log", "--deepspeed_config", config, "--max-skipped-steps", 4)
    message = one_rank.run(train_in_fp16, [*flags, "--train-iters", "14"])[0]
    assert "step 4" in message
    assert "overflowed 4 steps in a row" in message


def train_to_failure(flags):
    try:
        train_in_pool(flags)
    except TrainingError as error:
        return str(error)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(two_ranks, tmp_path, text_file):
    flags = flags_for(tmp_path, text_file, "log", "--fp32", "--train-iters", 20, "--lr", 1e30, "--clip-grad", 0)
    messages = two_ranks.run(train_to_failure, flags)
    assert messages[0] == messages[1]
    assert "step" in messages[0] and "lower --lr" in messages[0]
