"""TEAMS against formulas written out in float64: losses, all gradients, what gets none, and its ablations."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from batches import Rows
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.objective import SumsLayout
from peer_scale.objectives.task import PretrainingTask
from peer_scale.objectives.teams import Teams
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.objectives.works import GlobalCounts, StepInfo
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import single_process_topology

VOCAB, MASK, LENGTH = 37, 4, 12
HEADS, EPS = 2, 1e-12
SHAPE = EncoderShape(num_layers=3, hidden_size=16, ffn_hidden_size=24, num_attention_heads=HEADS)
MODEL = ModelConfig(
    generator=replace(SHAPE, num_layers=2),
    ranker=replace(SHAPE, num_layers=4),
    num_shared_layers=1,
    vocab_size=VOCAB,
    embedding_size=10,  # so that there are projections
    max_position_embeddings=LENGTH,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
WORKS = ("generator", "mlm_head", "ranker", "selection")
MLM_ONLY, RTD_ONLY, MWS_ONLY = ("generator.", "mlm_head."), ("rtd_branch.",), ("mws_branch.",)


def make_rows(num_extra=4, seed=0):
    """Sequences of unequal length with unequal numbers of selected positions; one of the slots is not used in each."""
    generator = torch.Generator().manual_seed(seed)
    lengths, counts, width = torch.tensor([12, 9, 5, 12]), torch.tensor([4, 3, 1, 4]), 5
    ids = torch.randint(MASK + 1, VOCAB, (4, LENGTH), generator=generator)
    is_token = torch.arange(LENGTH) < lengths[:, None]
    ids[~is_token] = 0
    positions = torch.zeros(4, width, dtype=torch.int64)
    for row, (length, count) in enumerate(zip(lengths.tolist(), counts.tolist(), strict=True)):
        positions[row, :count] = 1 + torch.randperm(length - 1, generator=generator)[:count].sort().values
    is_selected = torch.arange(width) < counts[:, None]
    masked = ids.clone()
    masked[torch.arange(4)[:, None].expand_as(positions)[is_selected], positions[is_selected]] = MASK
    types = (torch.arange(LENGTH) > 6).long().expand(4, -1) * is_token
    uniforms = torch.rand(4, width, generator=generator)
    extra = torch.rand(4, width, num_extra, generator=generator)
    return Rows(ids, masked, types, is_token, positions, is_selected, uniforms, extra)


def make_batch(num_extra=4, seed=0):
    return make_rows(num_extra, seed).batch()


def make_task(objective, model=MODEL, seed=1):
    """Weights so large that all parts of the loss depend on all parts of the model."""
    task = PretrainingTask(model, objective, single_process_topology().tensor_parallel)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return task


def step_of(batch, warmup=False):
    return StepInfo(
        GlobalCounts(*(torch.tensor(float(of.num_tokens)) for of in (batch.selected, batch.sequences))), warmup
    )


def run(task, batch):
    """The unweighted losses by name, each with its own graph, and the values."""
    weights = {loss.name: loss.weight for loss in task.objective.losses}
    mlm, _, values = task(("generator", "mlm_head"), batch, step_of(batch))
    rtd, _, detected = task(("ranker",), batch, step_of(batch), values)
    mws, _, _ = task(("selection",), batch, step_of(batch), values | detected)
    losses = {"mlm_loss": mlm, "rtd_loss": rtd, "mws_loss": mws}
    return {name: loss / weights[name] for name, loss in losses.items()}, values | detected


class Written:
    """TEAMS in float64 on parameters by name: no module of the project, one sequence after the other."""

    def __init__(self, task, num_separate):
        named = task.model.named_parameters()
        self.p = {name: p.detach().double().requires_grad_() for name, p in named}
        self.num_separate = num_separate

    def losses(self, rows):
        nll, bce, choice, self.sampled, self.candidates, self.right = [], [], [], [], [], []
        for fields in zip(*rows, strict=True):
            sequence = Rows(*fields)
            length = int(sequence.is_token.sum())
            ids = sequence.input_ids[:length]
            at = sequence.positions[sequence.is_selected]
            types = sequence.token_types[:length]
            states = self.encode("generator", sequence.masked_ids[:length], types, MODEL.generator.num_layers)[at]
            logits = self.vocabulary_logits(states)
            nll += F.cross_entropy(logits, ids[at], reduction="none")
            probabilities = logits.detach().softmax(-1)
            corrupted = ids.clone()
            extra = sequence.extra_uniforms[sequence.is_selected]
            for row, where in enumerate(at.tolist()):
                corrupted[where] = inverse_cdf(probabilities[row], sequence.uniforms[row])
                left, chosen = probabilities[row].clone(), [int(ids[where])]
                for uniform in extra[row]:
                    left[chosen[-1]] = 0
                    chosen.append(inverse_cdf(left / left.sum(), uniform))
                self.candidates.append(chosen)
            self.sampled += corrupted[at].tolist()
            trunk = self.encode("ranker", corrupted, types, MODEL.ranker.num_layers - self.num_separate)
            bce += self.detection(trunk, (corrupted != ids).double())
            choice += self.selection(trunk, at)
        return {name: torch.stack(x).mean() for name, x in (("mlm_loss", nll), ("rtd_loss", bce), ("mws_loss", choice))}

    def encode(self, network, ids, types, num_layers):
        p = self.p
        x = p["embeddings.word.weight"][ids] + p["embeddings.token_type.weight"][types]
        x = self.norm(x + p["embeddings.position.weight"][: len(ids)], "embeddings.norm")
        x = self.dense(x, f"{network}.projection")
        names = ["shared_layers.0", *(f"{network}.layers.{number}" for number in range(num_layers - 1))]
        for name in names:
            x = self.layer(x, name)
        return x

    def layer(self, x, name):
        length, width = x.shape
        qkv = self.dense(x, f"{name}.attention.qkv").view(length, HEADS, 3, width // HEADS)
        query, key, value = qkv.permute(2, 1, 0, 3)
        shares = (query @ key.transpose(1, 2) / math.sqrt(width // HEADS)).softmax(-1)
        attended = (shares @ value).transpose(0, 1).reshape(length, width)
        x = self.norm(x + self.dense(attended, f"{name}.attention.dense"), f"{name}.attention_norm")
        inner = self.gelu(self.dense(x, f"{name}.feed_forward.up"))
        return self.norm(x + self.dense(inner, f"{name}.feed_forward.down"), f"{name}.feed_forward_norm")

    def vocabulary_logits(self, states):
        states = self.norm(self.gelu(self.dense(states, "mlm_head.dense")), "mlm_head.norm")
        return (states @ self.p["embeddings.word.weight"].T + self.p["mlm_head.bias"])[:, :VOCAB]

    def detection(self, x, is_replaced):
        for number in range(self.num_separate):
            x = self.layer(x, f"rtd_branch.layers.{number}")
        score = self.gelu(self.dense(x, "rtd_branch.head.dense")) @ self.p["rtd_branch.head.score.weight"][0]
        probability = 1 / (1 + (score - self.p["rtd_branch.head.free_thresholds"][-1]).exp())
        return -(is_replaced * probability.log() + (1 - is_replaced) * (1 - probability).log())

    def selection(self, x, at):
        for number in range(self.num_separate):
            x = self.layer(x, f"mws_branch.layers.{number}")
        states = self.norm(self.gelu(self.dense(x[at], "mws_branch.dense")), "mws_branch.norm")
        rows = self.p["embeddings.word.weight"][torch.tensor(self.candidates[-len(at) :])]
        shares = torch.einsum("ne,nce->nc", states, rows).softmax(-1)
        self.right += (shares.argmax(-1) == 0).tolist()
        return -shares[:, 0].log()

    def dense(self, x, name):
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * self.p[f"{name}.weight"] + self.p[f"{name}.bias"]

    def gelu(self, x):
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def inverse_cdf(probabilities, uniform):
    return int((probabilities.cumsum(0) <= uniform.double()).sum())


@pytest.mark.parametrize(("num_separate", "num_negatives"), [(1, 4), (2, 4), (3, 1)])
def test_losses_and_gradients(num_separate, num_negatives):
    objective = Teams(num_separate_layers=num_separate, num_negatives=num_negatives)
    task, rows = make_task(objective), make_rows(num_negatives)
    written, batch = Written(task, num_separate), rows.batch()
    expected = written.losses(rows)
    found, values = run(task, batch)

    assert values["sampled"].tolist() == written.sampled
    assert values["candidates"].tolist() == written.candidates
    named = dict(task.model.named_parameters())
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected[name].item(), rel=1e-5)
        ours = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(expected[name], written.p.values(), retain_graph=True, allow_unused=True)
        for parameter, one, other in zip(named, ours, theirs, strict=True):
            if other is None:
                assert one is None or not one.any(), f"{name} must give no gradient to {parameter}"
            else:
                assert other.any(), f"{name} does not depend on {parameter}: the test tests nothing"
                scale = other.abs().max().item()
                torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * scale, msg=f"{name} {parameter}")

    total, sums, _ = task(WORKS, batch, step_of(batch))
    weighted = expected["mlm_loss"] + 5 * expected["rtd_loss"] + 2 * expected["mws_loss"]
    assert total.item() == pytest.approx(weighted.item(), rel=1e-5)
    metrics = SumsLayout(objective).metrics(sums.tolist())
    assert metrics["loss"] == pytest.approx(weighted.item(), rel=1e-5)
    assert metrics["mws_accuracy"] == sum(written.right) / len(written.right)
    for name, loss in expected.items():
        assert metrics[name] == pytest.approx(loss.item(), rel=1e-5)


def test_what_gets_no_gradient():
    """Nothing flows through samples, labels and candidates, nor from one branch into the other."""
    task, batch = make_task(Teams()), make_batch()
    losses, values = run(task, batch)
    assert not any(values[name].requires_grad for name in ("sampled", "labels", "candidates"))
    named = dict(task.model.named_parameters())
    strangers = {
        "mlm_loss": ("ranker.", *RTD_ONLY, *MWS_ONLY),
        "rtd_loss": (*MLM_ONLY, *MWS_ONLY),
        "mws_loss": (*MLM_ONLY, *RTD_ONLY),
    }
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(named, gradients, strict=True):
            has_gradient = gradient is not None and bool(gradient.any())
            assert has_gradient != parameter.startswith(strangers[name]), (name, parameter)


def test_two_candidates_are_a_sigmoid_of_their_scores_difference():
    task, batch = make_task(Teams(num_negatives=1)), make_batch(1)
    losses, values = run(task, batch)
    rows = task.model.embeddings.word.weight[values["candidates"]]
    scores = torch.einsum("ne,nce->nc", values["selection_states"], rows)
    of_each = F.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], torch.ones(len(scores)), reduction="none")
    assert losses["mws_loss"].item() == pytest.approx(of_each.mean().item(), rel=1e-5)


def test_loss_at_the_start():
    """All guess blindly: ln V + 5 ln 2 + 2 ln 5."""
    shape = EncoderShape(num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=2)
    model = replace(MODEL, generator=replace(shape, num_layers=2), ranker=shape, vocab_size=1000, embedding_size=64)
    topology = single_process_topology().tensor_parallel
    task = PretrainingTask(model, Teams(), topology)
    initialize_weights(task, seed=1, std=model.init_std, vocab_size=model.vocab_size, tensor_parallel=topology)
    torch.manual_seed(0)
    count, length, width = 16, 12, 3
    ids = torch.randint(5, 1000, (count, length))
    positions = torch.stack([torch.randperm(length)[:width] for _ in range(count)])
    masked = ids.scatter(1, positions, MASK)
    everything = torch.ones(count, length, dtype=torch.bool)
    batch = Rows(
        *(ids, masked, torch.zeros_like(ids), everything, positions, everything[:, :width]),
        *(torch.rand(count, width), torch.rand(count, width, 4)),
    ).batch()
    loss, _, _ = task(WORKS, batch, step_of(batch))
    assert loss.item() == pytest.approx(math.log(1000) + 5 * math.log(2) + 2 * math.log(5), rel=0.01)


def gradients_of(task, works, batch):
    loss, _, values = task(works, batch, step_of(batch))
    named = dict(task.model.named_parameters())
    found = torch.autograd.grad(loss, named.values(), allow_unused=True)
    return loss.detach(), dict(zip(named, found, strict=True)), values


def adopt(task, other, renamed):
    """Give `task` the parameters of `other` as far as it has them; `renamed` maps prefixes of theirs to its own."""
    theirs = {}
    for name, parameter in other.model.named_parameters():
        prefix = next((prefix for prefix in renamed if name.startswith(prefix)), "")
        theirs[renamed.get(prefix, "") + name.removeprefix(prefix)] = parameter
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            parameter.copy_(theirs[name])
    return {ours: next(n for n, p in other.model.named_parameters() if p is theirs[ours]) for ours in theirs}


def test_without_selection_it_is_electra_with_shared_layers():
    teams, batch = make_task(Teams(mws_weight=0)), make_batch()
    electra = make_task(TokenQualityRanking(num_levels=2, taus=(), top_t=2**31, tqr_weight=5.0))
    names = adopt(electra, teams, {"rtd_branch.layers.0.": "ranker.layers.2.", "rtd_branch.head.": "ranking_head."})
    loss, gradients, values = gradients_of(teams, WORKS, batch)
    expected_loss, expected, expected_values = gradients_of(electra, ("generator", "mlm_head", "ranker"), batch)
    assert torch.equal(values["sampled"], expected_values["sampled"])
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(gradients.pop(names[name]), gradient), name
    assert all(name.startswith("mws_branch.") and not gradient.any() for name, gradient in gradients.items())


def test_without_both_it_is_a_masked_language_model():
    teams, batch = make_task(Teams(rtd_weight=0, mws_weight=0)), make_batch()
    alone = replace(MODEL, ranker=None, num_shared_layers=0)
    bert = make_task(MaskedLanguageModel(), alone)
    names = adopt(
        bert, teams, {"shared_layers.0.": "generator.layers.0.", "generator.layers.0.": "generator.layers.1."}
    )
    loss, gradients, _ = gradients_of(teams, WORKS, batch)
    expected_loss, expected, _ = gradients_of(bert, ("generator", "mlm_head"), batch)
    assert torch.equal(loss, expected_loss)
    for name, gradient in expected.items():
        assert torch.equal(gradients.pop(names[name]), gradient), name
    assert all(not gradient.any() for gradient in gradients.values())


def test_bf16_is_near():
    task, batch = make_task(Teams()), make_batch()
    expected, _ = run(task, batch)
    found, values = run(task.bfloat16(), batch)
    assert values["selection_states"].dtype == torch.bfloat16
    for name, loss in found.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rtd_weight": -1.0}, "rtd_weight is -1.0; it must be a number of at least 0"),
        ({"mws_weight": math.nan}, "mws_weight is nan; it must be a number of at least 0"),
        ({"num_negatives": 0}, "num_negatives is 0; it must be a whole number of at least 1"),
        ({"num_separate_layers": 0}, "num_separate_layers is 0; it must be a whole number of at least 1"),
        (
            {"num_separate_layers": 4},
            "num_separate_layers is 4; of the ranker's 4 layers at most 3 can be above the trunk",
        ),
        (
            {"num_negatives": VOCAB},
            "num_negatives is 37, but a vocabulary of 37 has only 36 tokens beside the original",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, said):
    with pytest.raises(UserError) as error:
        Teams(**changes).check_model(MODEL)
    assert str(error.value) == said


def test_bounds_of_separate_layers():
    Teams(num_separate_layers=3, num_negatives=VOCAB - 1).check_model(MODEL)
    for model in (replace(MODEL, num_shared_layers=0), replace(MODEL, num_shared_layers=2)):
        limit = 4 - max(model.num_shared_layers, 1)
        objective = Teams(num_separate_layers=limit)
        objective.check_model(model)
        batch = make_batch()
        loss, _, _ = make_task(objective, model)(WORKS, batch, step_of(batch))
        assert loss.isfinite()
        with pytest.raises(UserError, match="above the trunk"):
            Teams(num_separate_layers=limit + 1).check_model(model)
    with pytest.raises(UserError, match="has no ranker"):
        Teams().check_model(replace(MODEL, ranker=None, num_shared_layers=0))
