"""Works of a graph run one by one, over parts of the model too, are the whole forward pass bit for bit."""

import contextlib
from dataclasses import replace

import pytest
import torch

from peer_scale.kernels.availability import gpu_branches
from peer_scale.models.config import EncoderShape, ModelPart
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.objective import SumsLayout
from peer_scale.objectives.task import PretrainingTask
from peer_scale.objectives.teams import Teams
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.objectives.works import GlobalCounts, StepInfo
from peer_scale.parallel.topology import single_process_topology
from test_teams import MODEL, make_batch, make_rows, make_task

NARROW = EncoderShape(num_layers=2, hidden_size=8, ffn_hidden_size=12, num_attention_heads=1)
SETTINGS = {
    "bert": (MaskedLanguageModel(), replace(MODEL, ranker=None, num_shared_layers=0)),
    "electra": (
        TokenQualityRanking(num_levels=2, taus=(), top_t=2**31),
        replace(MODEL, generator=NARROW, num_shared_layers=0),
    ),
    "peer": (TokenQualityRanking(num_levels=4, taus=(1.0, 4.0), delta=3.0), MODEL),
    "teams": (Teams(), MODEL),
}
COUNTS = GlobalCounts(torch.tensor(40.0), torch.tensor(300.0))  # of a step of several micro-batches


def setting(name, warmup=False):
    objective, model = SETTINGS[name]
    return objective, model, make_batch(objective.num_extra_uniforms), StepInfo(COUNTS, warmup)


def one_by_one(tasks, batch, step):
    """Run each work on the part that has it, or in turn on both halves of its path; gives losses, sums and values."""
    losses, total, mail = [], 0, {}
    for work in tasks[0].graph.works:
        for task in tasks:
            path = task.part.layers(work.network) or task.part.shared_layers if work.network else None
            if task.part.has_embeddings or (path is not None and len(path)):
                loss, sums, values = task((work.name,), batch, step, mail)
                losses += [] if loss is None else [loss]
                total, mail = total + sums, mail | values
    return losses, total, mail


def in_order(losses):
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_one_by_one(name, warmup):
    objective, model, batch, step = setting(name, warmup)
    task = make_task(objective, model)
    works = tuple(work.name for work in task.graph.works)
    loss, sums, values = task(works, batch, step)
    assert sums.dtype == torch.float64 and len(sums) == len(SumsLayout(objective))
    losses, total, mail = one_by_one([task], batch, step)
    assert len(losses) == len(objective.losses)
    assert torch.equal(in_order(losses), loss)
    assert torch.equal(total, sums)
    assert values.keys() == mail.keys()
    assert all(torch.equal(values[key], mail[key]) for key in values)
    whole = torch.autograd.grad(loss, list(task.model.parameters()))
    apart = torch.autograd.grad(losses, list(task.model.parameters()))
    for one, other in zip(whole, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_way_for_gpus(name):
    """Attention, the head and what else GPUs compute otherwise, in plain torch: loss, sums and gradients of the CPU."""
    objective, model, batch, step = setting(name)
    task = make_task(objective, model)
    works, parameters = tuple(work.name for work in task.graph.works), list(task.model.parameters())
    found = []
    for way in (contextlib.nullcontext(), gpu_branches(triton=False)):
        with way:
            loss, sums, _ = task(works, batch, step)
            found.append((loss, sums, *torch.autograd.grad(loss, parameters)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=2e-6 * max(1.0, one.abs().max().item()))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "bert"])
def test_over_two_parts(name):
    """The ranker's path goes from one part to the other, and what it gives goes back."""
    objective, model, batch, step = setting(name)
    whole = make_task(objective, model)
    shapes = dict(whole.graph.networks)
    own = {network: shape.num_layers - model.num_shared_layers for network, shape in shapes.items()}
    shared, generator = range(model.num_shared_layers), range(own["generator"])
    first = (("generator", generator), ("ranker", range(1)))
    second = (("generator", range(0)), ("ranker", range(1, own["ranker"])))
    parts = (
        ModelPart(shared, first, has_embeddings=True, ends=("generator",)),
        ModelPart(range(0), second, has_embeddings=False, ends=("ranker",)),
    )
    topology = single_process_topology().tensor_parallel
    tasks = [PretrainingTask(model, objective, topology, part) for part in parts]
    theirs, names = whole.state_dict(), []
    for task in tasks:
        task.load_state_dict({key: theirs[key] for key in task.state_dict()})
        names += task.state_dict()
    assert sorted(names) == sorted(theirs), "each parameter is in one part"

    works = tuple(work.name for work in whole.graph.works)
    loss, sums, values = whole(works, batch, step)
    losses, total, mail = one_by_one(tasks, batch, step)
    assert torch.equal(in_order(losses), loss)
    assert torch.equal(total, sums)
    assert mail.keys() == {*values, "ranker"}, "hidden states on their way are called as their work"
    assert all(torch.equal(values[key], mail[key]) for key in values)
    gradients = torch.autograd.grad(loss, list(whole.parameters()))
    apart = torch.autograd.grad(losses, [p for task in tasks for p in task.parameters()])
    by_name = dict(zip((n for task in tasks for n, _ in task.named_parameters()), apart, strict=True))
    for (key, _), gradient in zip(whole.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, by_name[key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SETTINGS)
def test_sums_add_up_over_micro_batches(name):
    objective, model, batch, step = setting(name)
    task, rows = make_task(objective, model), make_rows(objective.num_extra_uniforms)
    works = tuple(work.name for work in task.graph.works)
    loss, sums, _ = task(works, batch, step)
    halves = [task(works, rows.part(part).batch(), step) for part in (slice(3), slice(3, 4))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], loss)
    torch.testing.assert_close(halves[0][1] + halves[1][1], sums, rtol=1e-5, atol=1e-5)
    named = dict(zip(task.sums.names, sums.tolist(), strict=True))
    assert (named["selected"], named["tokens"]) == (rows.is_selected.sum(), rows.is_token.sum())
    share = {"selected": COUNTS.selected, "tokens": COUNTS.tokens}
    of_step = sum(term.weight * named[term.name] / share[term.normaliser].item() for term in objective.losses)
    assert loss.item() == pytest.approx(of_step, rel=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_works_make_what_they_are_said_to(name):
    """Values in the given formats and widths; losses where they are said to be; each sum in one work."""
    objective, model, batch, step = setting(name)
    task = make_task(objective, model)
    mail, made = {}, torch.zeros(len(task.sums), dtype=torch.int64)
    formats = {"compute": torch.float32, "float32": torch.float32, "int64": torch.int64}
    for work in task.graph.works:
        loss, sums, values = task((work.name,), batch, step, mail)
        assert (loss is not None) == work.has_loss
        assert values.keys() == {value.name for value in work.gives}
        for value in work.gives:
            shape = (batch.positions.numel(), *([] if value.width is None else [value.width]))
            assert values[value.name].shape == shape
            assert values[value.name].dtype == formats[value.format]
            assert values[value.name].requires_grad == value.has_gradient
        made += sums != 0
        mail |= values
    assert made.max() == 1


@pytest.mark.parametrize("name", SETTINGS)
def test_no_parameter_is_left_out(name):
    objective, model, batch, step = setting(name)
    task = make_task(objective, model)
    loss, _, _ = task(tuple(work.name for work in task.graph.works), batch, step)
    loss.backward()
    untouched = [name for name, parameter in task.named_parameters() if parameter.grad is None]
    assert not untouched
