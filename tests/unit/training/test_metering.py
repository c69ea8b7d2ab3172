"""From a step's sums to its line of metrics.jsonl."""

import json
import math

import pytest
import torch

from peer_scale.checkpoints.progress import Progress
from peer_scale.flops import actual_train_flops, paper_train_flops
from peer_scale.objectives.graph import SampleSize
from peer_scale.objectives.objective import SumsLayout
from peer_scale.training.metering import Meter, StepRecord
from small_runs import GLOBAL_BATCH, small_run

ALWAYS = {
    *("step", "samples", "tokens", "loss", "mlm_loss", "lr", "grad_norm", "loss_scale", "step_time_s", "data_wait_s"),
    "skipped_steps",
    *("tokens_per_second", "fill", "train_flops", "tflops_per_device", "mfu", "mlm_accuracy"),
    "varying_share",
}
OF_RANKERS = {"replaced_fraction", "rtd_precision", "rtd_recall", "rtd_auc"}
OF_RANKS = {"tqr_loss", "rank_label_fractions", "rank_concordance", "level_accuracy"}
KEYS = {
    "bert-tiny": ALWAYS,
    "electra-tiny": ALWAYS | OF_RANKERS | OF_RANKS,
    "peer-tiny": ALWAYS | OF_RANKERS | OF_RANKS,
    "teams-tiny": ALWAYS | OF_RANKERS | {"rtd_loss", "mws_loss", "mws_accuracy"},
}
PEAK = 2e12


def meter(run, *, num_devices=2, peak=PEAK):
    return Meter(run, num_devices, peak)


def record(step, **changes):
    fields = {"lr": 0.01, "grad_norm": 0.5, "loss_scale": 1.0, "skipped_steps": 0, "step_time": 0.5, "data_wait": 0.1}
    return StepRecord(step, torch.zeros(0), **(fields | changes))


def sums_of(run, **named):
    """Sums by name: 20 selected positions of 6 sequences of 25 tokens, losses of 30, and what `named` changes."""
    layout = SumsLayout(run.objective)
    values = {"selected": 20.0, "tokens": 150.0, "token_pairs": 6 * 25.0**2}
    values = {loss.name: 30.0 for loss in run.objective.losses} | values | named
    return [values.get(name, 0.0) for name in layout.names]


@pytest.mark.parametrize("preset", KEYS)
def test_a_line_of_metrics(preset):
    run = small_run(preset)
    metrics = meter(run).metrics(sums_of(run, mlm_correct=5.0), record(3, extra={"own": 7}), Progress(3, 18, 450))
    assert metrics.keys() == KEYS[preset] | {"own"}
    assert list(metrics)[:4] == ["step", "samples", "tokens", "loss"]
    assert (metrics["step"], metrics["samples"], metrics["tokens"], metrics["own"]) == (3, 18, 450, 7)
    per_loss = {"mlm_loss": 30 / 20, "tqr_loss": 30 / 150, "rtd_loss": 30 / 150, "mws_loss": 30 / 20}
    expected = {loss.name: per_loss[loss.name] for loss in run.objective.losses}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["loss"] == pytest.approx(sum(loss.weight * expected[loss.name] for loss in run.objective.losses))
    assert metrics["mlm_accuracy"] == 0.25
    assert metrics["tokens_per_second"] == 300
    assert metrics["fill"] == 150 / (6 * 32)
    assert (metrics["step_time_s"], metrics["data_wait_s"], metrics["lr"]) == (0.5, 0.1, 0.01)
    json.dumps(metrics, allow_nan=False)


def test_flops_and_their_rates():
    run = small_run()
    slow = meter(run).metrics(sums_of(run), record(3), Progress(3, 18, 450))
    fast = meter(run, num_devices=1).metrics(sums_of(run), record(4, step_time=0.25), Progress(4, 36, 600))
    assert fast["train_flops"] == 2 * slow["train_flops"], "cumulative"
    assert slow["train_flops"] == paper_train_flops(run.model, run.objective, seq_length=32, samples=18)
    assert fast["tflops_per_device"] == pytest.approx(4 * slow["tflops_per_device"])
    assert slow["mfu"] == pytest.approx(slow["tflops_per_device"] * 1e12 / PEAK)
    # two passes' layers: 6 FLOPs per parameter and token; heads and attention come on top
    layer = 4 * 128**2 + 2 * 128 * 512
    least = 6 * (2 + 4) * layer * 150 / 0.25 / 1e12
    assert least < fast["tflops_per_device"] < 2 * least
    assert meter(run, peak=None).metrics(sums_of(run), record(1), Progress(1, 6, 150))["mfu"] is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_steps_flops_are_those_of_its_own_sequences(checkpointing):
    run = small_run(activation_checkpointing=checkpointing)
    lengths, selected = (4, 32, 9, 17, 32, 5), (1, 5, 1, 3, 5, 1)
    sums = sums_of(run, tokens=sum(lengths), selected=sum(selected), token_pairs=sum(n * n for n in lengths))
    found = meter(run).metrics(sums, record(3), Progress(3, 18, 450))
    sizes = [SampleSize.of_sequence(*one) for one in zip(lengths, selected, strict=True)]
    each = [
        actual_train_flops(run.model, run.objective, size, samples=1, activation_checkpointing=checkpointing)
        for size in sizes
    ]
    assert found["tflops_per_device"] * 1e12 == pytest.approx(sum(each) / 0.5 / 2, rel=1e-12)
    full = run.masking.num_predictions(32)
    sums = sums_of(run, tokens=6 * 32, selected=6 * full, token_pairs=6 * 32**2)
    found = meter(run).metrics(sums, record(3), Progress(3, 18, 450))
    expected = actual_train_flops(
        run.model, run.objective, run.sample_size, samples=6, activation_checkpointing=checkpointing
    )
    assert found["tflops_per_device"] * 1e12 == pytest.approx(expected / 0.5 / 2, rel=1e-12)
    assert found["fill"] == 1


def test_progress_adds_up():
    run = small_run()
    after = meter(run).advance(Progress(4, 24, 1000), sums_of(run), record(5))
    assert after == Progress(5, 24 + GLOBAL_BATCH, 1150)
    assert isinstance(after.tokens, int)


def test_a_step_without_a_gradient_norm():
    run = small_run()
    assert meter(run).metrics(sums_of(run), record(1, grad_norm=None), Progress(1, 6, 150))["grad_norm"] is None
    assert meter(run).metrics(sums_of(run), record(1, grad_norm=torch.tensor(0.5)), Progress())["grad_norm"] == 0.5


def test_what_is_not_finite_is_passed_on():
    run = small_run()
    metrics = meter(run).metrics(sums_of(run, mlm_loss=math.inf), record(1, grad_norm=math.nan), Progress(1, 6, 150))
    assert metrics["mlm_loss"] == math.inf and metrics["grad_norm"] is None
