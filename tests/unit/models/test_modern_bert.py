"""Rotary, pre-norm, gated models with local attention against transformers' ModernBERT: outputs and gradients."""

from dataclasses import replace

import pytest
import torch
import transformers

from peer_scale.checkpoints.manifest import VOCABULARY_PARAMETERS
from peer_scale.conversion.architecture import Architecture
from peer_scale.errors import UserError
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.task import build_model
from peer_scale.objectives.teams import Teams
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.parallel.initialization import initialize_weights
from peer_scale.parallel.topology import single_process_topology
from peer_scale.sequences import Sequences

SHAPE = EncoderShape(num_layers=5, hidden_size=48, ffn_hidden_size=36, num_attention_heads=4)
BERT = ModelConfig(
    generator=SHAPE,
    ranker=None,
    vocab_size=101,
    embedding_size=48,
    max_position_embeddings=40,
    num_token_types=0,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    layer_norm_eps=1e-5,
    position_embedding="rotary",
    rotary_base=160000.0,
    local_rotary_base=10000.0,
    attention_window=6,
    global_attention_every_n=2,
    norm_position="pre",
    norm_bias=False,
    activation="geglu",
    linear_bias=False,
)
PAIR = replace(BERT, generator=replace(SHAPE, num_layers=3), ranker=SHAPE, num_shared_layers=1)
ELECTRA = TokenQualityRanking(num_levels=2, taus=())
MODELS = {
    "bert": (BERT, MaskedLanguageModel()),
    "swiglu with biases": (
        replace(
            BERT,
            linear_bias=True,
            norm_bias=True,
            activation="swiglu",
            attention_window=None,
            local_rotary_base=None,
        ),
        MaskedLanguageModel(),
    ),
    "pair": (PAIR, ELECTRA),
    "teams": (PAIR, Teams(num_separate_layers=2)),
}
LENGTHS = [31, 19, 7, 3, 1]
TOLERANCE = 1e-5


@pytest.fixture(params=MODELS)
def built(request):
    config, objective = MODELS[request.param]
    ranks = single_process_topology().tensor_parallel
    model = build_model(config, objective, ranks)
    initialize_weights(model, seed=3, std=0.1, vocab_size=config.vocab_size, tensor_parallel=ranks)
    with torch.no_grad():  # biases and norms too, so that a swapped pair shows
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model, objective


def padded_text():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 101, (len(LENGTHS), max(LENGTHS)), generator=generator)
    return ids, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def architectures_of(model, objective):
    return [Architecture.of(export, model.config, objective) for export in objective.exports(model.config)]


def hugging_face(architecture, model):
    """Transformers' model with our weights."""
    ours = model.state_dict()
    reference = getattr(transformers, architecture.export.class_name)(architecture.config(pad_token_id=0)).train()
    prefix = "" if architecture.export.head else f"{architecture.prefix}."
    state = {
        name.removeprefix(prefix): tensor.clone()
        for entry in architecture.entries
        for name, tensor in zip(entry.theirs, entry.convert(ours[entry.ours]), strict=True)
    }
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"decoder.weight"}, "tied to the word embeddings"
    return reference


def our_hidden(model, architecture, ids, mask):
    export, sequences = architecture.export, Sequences.of(mask.sum(1).tolist())
    hidden = model.encode(export.network, ids[mask], torch.zeros_like(ids[mask]), sequences)
    for name in export.top_layers:
        hidden = model.get_submodule(name)(hidden, sequences)
    return hidden if export.top_norm is None else model.get_submodule(export.top_norm)(hidden)


def test_hidden_states_logits_and_gradients(built):
    model, objective = built
    ids, mask = padded_text()
    for architecture in architectures_of(model, objective):
        model.zero_grad()
        export = architecture.export
        reference = hugging_face(architecture, model)
        hidden = our_hidden(model, architecture, ids, mask)
        encoder = reference.model if export.head else reference
        expected = encoder(ids, attention_mask=mask).last_hidden_state[mask]
        assert (hidden - expected).abs().max() < TOLERANCE
        ours, theirs = hidden, expected
        if export.logits is not None:
            ours, theirs = export.logits(model, hidden), reference(ids, attention_mask=mask).logits[mask]
            assert (ours - theirs).abs().max() < TOLERANCE
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)) / len(ours)
        (ours * weights).sum().backward()
        (theirs * weights).sum().backward()
        gradients = {name: p.grad for name, p in reference.named_parameters()}
        mine = {name: p.grad for name, p in model.named_parameters()}
        prefix = "" if export.head else f"{architecture.prefix}."
        compared = 0
        for entry in architecture.entries:
            gradient = mine[entry.ours]
            for name, own in zip(entry.theirs, entry.convert(gradient), strict=True):
                # the label "original" is no parameter of ours
                rows = slice(1 if name.startswith("classifier.") else 0, None)
                assert (own - gradients[name.removeprefix(prefix)])[rows].abs().max() < TOLERANCE, name
                compared += 1
        assert compared == len(gradients)


def test_the_map_covers_every_parameter_once_and_leads_back(built):
    model, objective = built
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    architectures = architectures_of(model, objective)
    for architecture in architectures:
        for entry in architecture.entries:
            weight = parameters[entry.ours][: 101 if entry.ours in VOCABULARY_PARAMETERS else None]
            restored = entry.restore(entry.convert(weight))
            whole = restored if entry.complete is None else entry.complete(weight, restored)
            assert torch.equal(whole, weight), entry.ours
    mapped = [name for one in architectures for name in (*(e.ours for e in one.entries), *one.export.left_out)]
    assert set(mapped) == parameters.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding": "t5_bias", "local_rotary_base": None}, "ModernBERT no position_embedding t5_bias"),
        ({"norm": "rms_norm"}, "ModernBERT no norm rms_norm"),
        ({"norm_position": "post"}, "ModernBERT no norm_position post"),
        ({"activation": "gelu"}, "ModernBERT no activation gelu"),
        ({"num_token_types": 2}, "ModernBERT no num_token_types 2"),
        ({"embedding_size": 24}, "ModernBERT no embedding_size 24 beside hidden_size 48"),
    ],
)
def test_what_transformers_has_no_class_for_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        MaskedLanguageModel().exports(replace(BERT, **changes))
    assert "\n" not in str(refusal.value)
