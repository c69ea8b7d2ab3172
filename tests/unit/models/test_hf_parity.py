"""Single-process numerics against transformers' ELECTRA with the same random weights: outputs and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from transformers import ElectraForMaskedLM, ElectraForPreTraining, ElectraModel

from peer_scale.checkpoints.manifest import VOCABULARY_PARAMETERS
from peer_scale.conversion.architecture import Architecture
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.models.generator_head import generator_head
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.task import build_model
from peer_scale.objectives.tqr import TokenQualityRanking, tqr_loss
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import build_topology, single_process_topology
from peer_scale.sequences import Sequences

SHAPE = EncoderShape(num_layers=3, hidden_size=48, ffn_hidden_size=96, num_attention_heads=4)
MODELS = {
    "peer": ModelConfig(
        generator=replace(SHAPE, num_layers=2), ranker=SHAPE, num_shared_layers=1, vocab_size=101, embedding_size=48
    ),
    "electra": ModelConfig(generator=EncoderShape(3, 16, 32, 2), ranker=SHAPE, vocab_size=101, embedding_size=24),
    "bert": ModelConfig(generator=SHAPE, ranker=None, vocab_size=101, embedding_size=48),
}
TOLERANCE = 1e-5


@pytest.fixture(params=MODELS)
def model(request):
    config = replace(MODELS[request.param], hidden_dropout=0.0, attention_dropout=0.0, max_position_embeddings=32)
    ranks = single_process_topology().tensor_parallel
    built = build_model(config, objective_of(config), ranks)
    initialize_weights(built, seed=3, std=0.1, vocab_size=config.vocab_size, tensor_parallel=ranks)
    with torch.no_grad():  # biases and LayerNorms too, so that a swapped pair shows
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return built


LENGTHS = {"unequal": (20, 13, 7), "from three on": (3, 4, 32, 5, 31, 17), "all full": (32, 32), "one": (9,)}


@pytest.fixture(params=LENGTHS)
def text(request):
    torch.manual_seed(0)
    lengths = torch.tensor(LENGTHS[request.param])
    ids = torch.randint(5, 101, (len(lengths), max(lengths)))
    types = (torch.arange(max(lengths)) > 11).long().expand_as(ids)
    mask = torch.arange(max(lengths)) < lengths[:, None]
    return ids, types, mask


def encode(model, network, text):
    ids, types, mask = text
    return model.encode(network, ids[mask], types[mask], Sequences.of(mask.sum(1).tolist()))


def objective_of(config):
    return MaskedLanguageModel() if config.ranker is None else TokenQualityRanking(num_levels=2, taus=())


def architectures_of(model):
    """All exports as transformers' ELECTRA classes, by branch."""
    objective = objective_of(model.config)
    exports = [export for export in objective.exports(model.config) if export.family == "electra"]
    return {export.branch: Architecture.of(export, model.config, objective) for export in exports}


def hugging_face(model, branch):
    architecture = architectures_of(model)[branch]
    entries = architecture.entries
    cls = ElectraForMaskedLM if branch == "generator" else ElectraForPreTraining
    reference = cls(architecture.config(pad_token_id=0)).train()
    ours = model.state_dict()
    state = {
        name: tensor.clone()
        for entry in entries
        for name, tensor in zip(entry.theirs, entry.convert(ours[entry.ours]), strict=True)
    }
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"generator_lm_head.weight"}, "tied to the word embeddings"
    return reference, entries


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max().item() < TOLERANCE


def assert_same_gradients(model, reference, entries):
    gradients = dict(reference.named_parameters())
    ours = dict(model.named_parameters())
    compared = 0
    for entry in entries:
        for name, mine in zip(entry.theirs, entry.convert(ours[entry.ours].grad), strict=True):
            assert_close(mine, gradients[name].grad)
            compared += 1
    assert compared == len(gradients)


def test_generator_is_electra_for_masked_lm(model, text):
    ids, types, mask = text
    reference, entries = hugging_face(model, "generator")
    hidden = encode(model, "generator", text)
    expected = reference.electra(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    assert_close(hidden, expected[mask])

    is_selected = (torch.rand(ids.shape) < 0.4) & mask
    is_selected[0, 1] = True
    labels = torch.where(is_selected, ids, -100)
    expected = reference(ids, attention_mask=mask, token_type_ids=types, labels=labels)
    states, bias = model.head("mlm_head")(hidden[is_selected[mask]])
    targets = ids[is_selected]
    output = generator_head(states, model.embeddings.word.weight, bias, targets, torch.rand(len(targets)))
    assert_close(output.loss.mean(), expected.loss)
    logits = expected.logits[is_selected]
    assert_close(output.original_logit, logits.gather(1, targets[:, None]).squeeze(1))
    assert_close(output.sampled_logit, logits.gather(1, output.sampled_ids[:, None]).squeeze(1))
    output.loss.mean().backward()
    expected.loss.backward()
    assert_same_gradients(model, reference, entries)


def test_ranker_with_two_levels_is_electra_for_pre_training(model, text):
    if model.config.ranker is None:
        pytest.skip("BERT has no ranker")
    ids, types, mask = text
    reference, entries = hugging_face(model, "ranker")
    hidden = encode(model, "ranker", text)
    expected = reference.electra(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    assert_close(hidden, expected[mask])

    replaced = torch.rand(ids.shape) < 0.3
    scores, thresholds = model.head("ranking_head")(hidden)
    expected = reference(ids, attention_mask=mask, token_type_ids=types, labels=replaced.float())
    assert_close(thresholds[-1] - scores, expected.logits[mask])
    loss = tqr_loss(scores, thresholds, 2.0 - replaced[mask].float()) / mask.sum()
    assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    assert_same_gradients(model, reference, entries)


def test_the_map_covers_every_parameter_once(model):
    found = architectures_of(model)
    assert set(found) == ({"generator"} if model.config.ranker is None else {"generator", "ranker"})
    ours = {entry.ours for architecture in found.values() for entry in architecture.entries}
    assert ours == set(dict(model.named_parameters()))


def test_the_map_leads_back(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for architecture in architectures_of(model).values():
        for entry in architecture.entries:
            weight = parameters[entry.ours][: 101 if entry.ours in VOCABULARY_PARAMETERS else None]
            assert torch.equal(entry.restore(entry.convert(weight)), weight), entry.ours


def test_electra_model_opens_the_encoder_alone(model, text):
    ids, types, mask = text
    reference, _ = hugging_face(model, "generator")
    alone = ElectraModel(reference.config)
    alone.load_state_dict(reference.electra.state_dict(), strict=True)
    expected = alone(ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    assert_close(encode(model, "generator", text), expected[mask])


def encode_sharded(config, weights, network, ids, types, lengths, grad):
    """Run by each of the tensor-parallel ranks, with sequence parallelism: states, and the gradients of its shards."""
    ranks = build_topology(
        torch.device("cpu"), tensor_parallel=dist.get_world_size(), sequence_parallel=True
    ).tensor_parallel
    model = build_model(config, objective_of(config), ranks)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            whole = weights[name]
            if getattr(parameter, "tensor_model_parallel", False):
                dim = parameter.partition_dim
                missing = parameter.shape[dim] * ranks.size - whole.shape[dim]  # the vocabulary is padded to more rows
                whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])]) if missing else whole
                whole = whole.chunk(ranks.size, dim)[ranks.rank]
            parameter.copy_(whole)
    hidden = model.encode(network, ids, types, Sequences.of(lengths))
    (hidden * grad).sum().backward()
    gradients = {
        name: (parameter.grad, parameter.partition_dim if hasattr(parameter, "partition_dim") else None)
        for name, parameter in named.items()
        if parameter.grad is not None
    }
    return hidden.detach(), gradients


@pytest.mark.parametrize("network", ["generator", "ranker"])
def test_two_tensor_parallel_ranks_are_electra_too(network, two_ranks):
    """Lengths of 3 to S, an odd number of tokens: the last rank's slice is filled up."""
    config = replace(MODELS["peer"], hidden_dropout=0.0, attention_dropout=0.0, max_position_embeddings=32)
    single = single_process_topology().tensor_parallel
    model = build_model(config, objective_of(config), single)
    initialize_weights(model, seed=3, std=0.1, vocab_size=101, tensor_parallel=single)
    torch.manual_seed(1)
    lengths = torch.tensor([32, 3, 17, 4, 5])
    ids = torch.randint(5, 101, (5, 32))
    types = (torch.arange(32) > 11).long().expand_as(ids)
    mask = torch.arange(32) < lengths[:, None]
    grad = torch.randn(int(lengths.sum()), SHAPE.hidden_size)
    assert len(grad) % 2 == 1

    reference, entries = hugging_face(model, network)
    expected = reference.electra(ids, attention_mask=mask, token_type_ids=types).last_hidden_state[mask]
    (expected * grad).sum().backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    by_rank = two_ranks.run(
        encode_sharded, config, weights, network, ids[mask], types[mask], lengths.tolist(), grad, timeout=60
    )
    compared = 0
    for hidden, _ in by_rank:
        assert_close(hidden, expected)
    for entry in entries:
        if entry.ours not in by_rank[0][1]:
            continue
        parts, dims = zip(*(gradients[entry.ours] for _, gradients in by_rank), strict=True)
        whole = parts[0] if dims[0] is None else torch.cat(parts, dims[0])
        if dims[0] is None:
            assert_close(parts[0], parts[1])
        whole = whole[:101] if entry.ours in VOCABULARY_PARAMETERS else whole
        for name, mine in zip(entry.theirs, entry.convert(whole), strict=True):
            assert (mine - theirs[name]).abs().max() < TOLERANCE * max(1.0, theirs[name].abs().max()), name
            compared += 1
    assert compared == sum(gradient is not None for gradient in theirs.values())
