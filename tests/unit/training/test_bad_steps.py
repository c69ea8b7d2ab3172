"""What ends a run at a bad step, what is skipped, and what is written of it; whole runs are in test_bad_steps.py."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from peer_scale.errors import TrainingError, UserError
from peer_scale.samples.shares import BatchPlan
from peer_scale.settings.run import OutputConfig
from peer_scale.training.callbacks.bad_steps import BadSteps
from peer_scale.training.metering import StepRecord
from peer_scale.training.spikes import SpikeWatch
from peer_scale.training.update_guard import UpdateGuard
from small_runs import small_run


class Judged:
    """Bad steps of a run without an engine: `step` judges one and gives its metrics."""

    def __init__(self, folder=None, **training):
        run = small_run(**training)
        guard = None if run.training.precision == "fp16" else SimpleNamespace(prepare=lambda **_: None)
        coordinator = SimpleNamespace(is_first_rank=True)
        self.callback = BadSteps(run, guard, SpikeWatch(6), BatchPlan(6, 3), None, coordinator, folder=folder)
        self.callback._find_culprits = lambda *_: []
        self.trainer = SimpleNamespace(engine=SimpleNamespace(skipped_steps=0))

    def step(self, number, skipped=0, loss_scale=1.0, grad_norm=0.5, **losses):
        record = StepRecord(number, torch.zeros(0), 0.01, grad_norm, loss_scale, skipped)
        metrics = {"loss": 1.0, "mlm_loss": 1.0, "tqr_loss": 1.0, "skipped_steps": skipped} | losses
        self.callback.on_step_known(self.trainer, record, metrics)
        return metrics

    def end(self, *args, **kwargs) -> str:
        with pytest.raises(TrainingError) as error:
            self.step(*args, **kwargs)
        return str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mlm_loss": math.nan}, "step 7: mlm_loss is nan; a lower --lr may help"),
        ({"tqr_loss": math.inf}, "step 7: tqr_loss is inf; a lower --lr may help"),
        ({"grad_norm": math.inf}, "step 7: the gradient norm is inf; a lower --lr may help"),
        ({"grad_norm": torch.tensor(math.nan)}, "step 7: the gradient norm is nan; a lower --lr may help"),
    ],
)
def test_what_is_not_finite_ends_the_run(precision, values, said):
    judged = Judged(precision=precision)
    judged.step(6)
    assert judged.end(7, **values) == said


def test_a_skipped_step_is_counted_told_and_described(tmp_path, capsys):
    judged = Judged(tmp_path / "bad_steps", on_nan="skip")
    assert judged.step(1)["skipped_steps"] == 0
    assert judged.step(2, mlm_loss=math.nan, grad_norm=math.inf)["skipped_steps"] == 1
    assert judged.step(3)["skipped_steps"] == 1
    assert capsys.readouterr().err == "warning: step 2: mlm_loss is nan; its update was left out\n"
    described = json.loads((tmp_path / "bad_steps/step_2.json").read_text())
    assert described["samples"] == [6, 7, 8, 9, 10, 11]
    assert (described["mlm_loss"], described["grad_norm"], described["tqr_loss"]) == ("nan", "inf", 1.0)
    assert (described["action"], described["wrong"]) == ("skip", "mlm_loss is nan")


def test_too_many_skips_in_a_row_end_the_run():
    judged = Judged(on_nan="skip", max_skipped_steps=3)
    bad = {"grad_norm": math.inf}
    judged.step(1, **bad)
    judged.step(2, **bad)
    judged.step(3)
    judged.step(4, **bad)
    judged.step(5, **bad)
    assert judged.end(6, **bad) == "step 6: 3 steps in a row were skipped; a lower --lr may help"


def test_a_loss_that_is_not_finite_by_itself_is_not_skipped():
    """Its update has happened."""
    assert "mlm_loss is inf" in Judged(on_nan="skip").end(1, mlm_loss=math.inf)


def test_fp16_overflows_are_skipped_until_there_are_too_many_in_a_row(tmp_path):
    judged = Judged(tmp_path, precision="fp16", max_skipped_steps=3)
    bad = {"grad_norm": math.inf, "loss_scale": 1024.0, "mlm_loss": math.inf}
    judged.step(1, 1, **bad)
    judged.step(2, 2, **bad)
    judged.step(3, 2)  # an update between them: the count begins anew
    judged.step(4, 3, **bad)
    judged.step(5, 4, **bad)
    assert not list(tmp_path.iterdir())
    assert judged.end(6, 5, **bad) == (
        "step 6: fp16 gradients overflowed 3 steps in a row (loss scale 1024); use bf16, or a lower --lr"
    )
    assert (tmp_path / "step_6.json").exists()


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    (tmp_path / "file").touch()
    Judged(tmp_path / "file" / "bad_steps", on_nan="skip").step(1, grad_norm=math.inf)
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["ignore", "warn", "skip"])
def test_a_spike_is_told_of_or_skipped(action, tmp_path, capsys):
    judged = Judged(tmp_path, on_spike=action)
    random = np.random.default_rng(0)
    norms = random.uniform(1, 2, 200).tolist()
    for step, norm in enumerate(norms, 1):
        judged.step(step, grad_norm=norm, loss=3 - norm)
    assert capsys.readouterr().err == ""
    judged.step(201, grad_norm=1.5, loss=1.5)
    # the limit as numpy has it: of the last 128 steps but the one before
    limit = np.mean(norms[72:200]) + 6 * np.std(norms[72:200])
    judged.step(202, grad_norm=limit * 0.999, loss=1.5)
    skipped = judged.step(203, grad_norm=50.0, loss=1.5)["skipped_steps"]
    assert skipped == (action == "skip")
    told = capsys.readouterr().err
    assert (told == "") == (action == "ignore")
    assert ("its update was left out" in told) == (action == "skip")
    judged.step(204, grad_norm=1.5, loss=100.0)
    assert judged.step(205)["skipped_steps"] == skipped, "a loss is known too late to skip its step"
    assert ("step 204: the loss 100 is above" in capsys.readouterr().err) == (action != "ignore")
    names = [] if action == "ignore" else ["step_203.json", "step_204.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_the_limits_of_a_step_are_those_of_an_uninterrupted_run():
    norms = np.random.default_rng(1).exponential(size=300).tolist()
    whole, resumed = SpikeWatch(3), SpikeWatch(3)
    assert whole.limits(1) is None
    for step, norm in enumerate(norms, 1):
        whole.note(step, 2 * norm, norm)
        if step % 7 == 0:
            resumed = SpikeWatch(3, resumed.recent)
        resumed.note(step, 2 * norm, norm)
        # known late or at once
        assert whole.limits(step + 1) == resumed.limits(step + 1)
    known = np.array(norms[171:299])
    assert whole.limits(301)[1] == pytest.approx(known.mean() + 3 * known.std(), rel=1e-6)
    assert whole.limits(301)[0] == pytest.approx(2 * whole.limits(301)[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"on_spike": "skip", "precision": "fp16"}, "--on-spike skip does not go with --fp16"),
        ({"on_nan": "rollback"}, "--on-nan rollback needs --save DIR"),
        ({"on_nan": "rollback", "precision": "fp16", "save": "x"}, "does not go with --fp16"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        small_run(output=OutputConfig(save=changes.pop("save", None)), **changes)


class Outer:
    """What DeepSpeed's optimizers have in common: they know the norm before they call torch's."""

    def __init__(self, inner):
        self.optimizer, self._global_grad_norm = inner, None

    def step(self, norm):
        self._global_grad_norm = torch.tensor(norm)
        self.optimizer.step()


def updated(norms, held=()):
    """Weights and Adam's state after updates with gradients that are all `norm`, guarded."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    adam = torch.optim.AdamW([weight], lr=0.1, fused=True)
    outer = Outer(adam)
    guard = UpdateGuard(SimpleNamespace(optimizer=outer), goes_on=True)
    for norm in norms:
        guard.prepare(hold=norm in held, largest_norm=100.0)
        weight.grad = torch.full((5,), norm)
        outer.step(norm)
    return [weight.detach(), *(adam.state[weight][name] for name in ("exp_avg", "exp_avg_sq", "step"))]


def test_a_bad_update_leaves_no_trace():
    # not finite, DeepSpeed's word for it, beyond the limit, held by the host
    found = updated([0.5, math.nan, -1.0, 1.0, 101.0, 3.0, math.inf, 0.25], held=[3.0])
    assert all(map(torch.equal, found, updated([0.5, 1.0, 0.25])))
    assert found[-1] == 3


def test_once_bad_nothing_happens_until_the_state_is_put_back():
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], lr=0.1, fused=True)
    outer = Outer(adam)
    guard = UpdateGuard(SimpleNamespace(optimizer=outer), goes_on=False)
    weight.grad = torch.ones(3)
    for norm in (math.inf, 1.0, 1.0):
        outer.step(norm)
    assert torch.equal(weight, torch.ones(3)) and adam.state[weight]["step"] == 0
    guard.release()
    outer.step(1.0)
    assert not torch.equal(weight, torch.ones(3)) and adam.state[weight]["step"] == 1
