"""A compiled task computes what the same task does without, and lengths that vary do not have it compiled again."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from peer_scale.errors import UserError
from peer_scale.models.layers import TransformerLayer
from peer_scale.training.compilation import check_compiler, compile_task
from test_task import setting
from test_teams import make_batch, make_rows, make_task

pytestmark = pytest.mark.heavy

MODERN = {
    "position_embedding": "rotary",
    "norm_position": "pre",
    "norm": "rms_norm",
    "activation": "geglu",
    "attention_window": 4,
    "global_attention_every_n": 2,
    "local_rotary_base": 100.0,
}


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    yield
    torch._dynamo.reset()


def outcome(task, batch, step):
    """The loss, the sums and all gradients."""
    works = tuple(work.name for work in task.graph.works)
    loss, sums, _ = task(works, batch, step)
    return [loss.detach(), sums, *torch.autograd.grad(loss, list(task.parameters()))]


def batches(num_extra):
    """Three micro-batches: other numbers of tokens, of sequences, of selected positions."""
    yield make_batch(num_extra)
    yield make_rows(num_extra, seed=1).part(slice(1, 4)).batch()
    yield make_rows(num_extra, seed=2).part(slice(0, 2)).batch()


def check(name, blocks, backend, *, recompute=False, rtol=1e-5):
    """Compare with a task of equal weights; gives how often something was compiled in each micro-batch."""
    objective, model, _, step = setting(name)
    task, compiled = (make_task(objective, replace(model, **blocks)) for _ in range(2))
    if recompute:
        apply_activation_checkpointing(compiled, check_fn=lambda module: isinstance(module, TransformerLayer))
    counter = CompileCounterWithBackend(backend)
    compile_task(compiled, backend=counter)
    counts = []
    for batch in batches(objective.num_extra_uniforms):
        counter.clear()
        found, expected = outcome(compiled, batch, step), outcome(task, batch, step)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max().item() + 1e-7)
        counts.append(counter.frame_count)
    return counts


@pytest.mark.parametrize(
    ("name", "blocks", "recompute"),
    [
        ("peer", {}, False),
        pytest.param("peer", MODERN, True, marks=pytest.mark.slow),
        pytest.param("teams", {"activation": "swiglu", "norm_bias": False}, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_is_as_eager(name, blocks, recompute):
    counts = check(name, blocks, "aot_eager", recompute=recompute)
    assert counts[0] >= 3, "layers and statistics"
    assert counts[1:] == [0, 0], "lengths that vary have nothing compiled again"
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "blocks"), [("peer", {}), ("electra", MODERN)])
def test_torchs_own_compiler(name, blocks, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    check_compiler(torch.device("cpu"))
    assert check(name, blocks, "inductor")[1:] == [0, 0]


@pytest.mark.slow
def test_dropout_is_drawn_again_where_activations_are_computed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    objective, model, batch, step = setting("electra")
    found = []
    for recompute in (False, True):
        task = make_task(objective, replace(model, hidden_dropout=0.2, attention_dropout=0.1))
        if recompute:
            apply_activation_checkpointing(task, check_fn=lambda module: isinstance(module, TransformerLayer))
        compile_task(task)
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(outcome(task, batch, step))
    first, same, other, *again = found
    assert not torch.equal(first[0], other[0])
    for expected in (same, again[0], again[1]):
        torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-6)


def test_a_machine_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "none"),))
    with pytest.raises(UserError, match="--compile: torch's compiler does not work on this machine: ") as caught:
        check_compiler(torch.device("cpu"))
    assert "\n" not in str(caught.value)
