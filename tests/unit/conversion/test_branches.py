"""Objectives with several branches: each has top layers of its own, and transformers' class the layers of all."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForPreTraining,
    ElectraModel,
)

from checkpoint_runs import write_random
from peer_scale.checkpoints.reader import read_checkpoint
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.task import build_model
from peer_scale.objectives.teams import Teams
from peer_scale.parallel.topology import single_process_topology
from peer_scale.sequences import Sequences

SHAPE = EncoderShape(num_layers=5, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4)
OBJECTIVE = Teams(num_separate_layers=2)


@pytest.fixture(scope="module")
def teams(tmp_path_factory, wordpiece):
    """A checkpoint of random numbers: three layers of trunk, one of them shared, and two above it in each branch."""
    model = ModelConfig(
        generator=replace(SHAPE, num_layers=2),
        ranker=SHAPE,
        num_shared_layers=1,
        vocab_size=wordpiece.vocab_size,
        embedding_size=24,
        max_position_embeddings=40,
    )
    folder = tmp_path_factory.mktemp("teams")
    return folder, write_random(folder, model, OBJECTIVE, "rtd", wordpiece)


def our_model(folder, weights):
    checkpoint = read_checkpoint(folder)
    model = build_model(checkpoint.model, checkpoint.objective, single_process_topology().tensor_parallel).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[: len(weights[name])] = weights[name]
    return model


def text(wordpiece):
    ids = torch.randint(wordpiece.vocab_size, (3, 20), generator=torch.Generator().manual_seed(2))
    types = (torch.arange(20) > 11).long().expand(3, 20)
    mask = torch.arange(20) < torch.tensor([[20], [13], [7]])
    return ids, types, mask


@torch.no_grad()
def test_detection_has_the_layers_of_its_branch(teams, run, tmp_path, wordpiece):
    folder, weights = teams
    assert "the rtd of" in run("to-hf", "--load", folder, "--output", tmp_path / "hf")
    theirs, report = ElectraForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.num_hidden_layers == 5
    assert "| Branch | rtd |" in (tmp_path / "hf/README.md").read_text()

    ids, types, mask = text(wordpiece)
    model = our_model(folder, weights)
    sequences = Sequences.of(mask.sum(1).tolist())
    hidden = model.encode("ranker", ids[mask], types[mask], sequences)
    scores, thresholds = model.head("rtd_branch")(hidden, sequences)
    expected = thresholds - scores
    found = theirs.eval()(input_ids=ids, token_type_ids=types, attention_mask=mask).logits[mask]
    assert expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-5


@torch.no_grad()
def test_selection_is_an_encoder_whose_head_is_said_to_be_left_out(teams, run, tmp_path, wordpiece):
    folder, weights = teams
    said = run("to-hf", "--load", folder, "--branch", "mws", "--output", tmp_path / "hf")
    assert "left out: mws_branch.dense, mws_branch.norm\n" in said
    theirs, report = ElectraModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    card = (tmp_path / "hf/README.md").read_text()
    assert "| Branch | mws |" in card and "mws_branch.dense.weight" in card and ".last_hidden_state" in card

    ids, types, mask = text(wordpiece)
    model = our_model(folder, weights)
    branch = model.head("mws_branch")
    sequences = Sequences.of(mask.sum(1).tolist())
    hidden = model.encode("ranker", ids[mask], types[mask], sequences)
    expected = branch(hidden, sequences, torch.arange(len(hidden)))
    hidden = theirs.eval()(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state
    found = branch.norm(F.gelu(branch.dense(hidden)))[mask]
    assert (found - expected).abs().max() < 1e-4 < expected.std()


def test_a_branch_comes_back_with_its_top_layers(teams, run, tmp_path):
    folder, weights = teams
    for branch in ("rtd", "generator"):
        run("to-hf", "--load", folder, "--branch", branch, "--output", tmp_path / branch)
    config = tmp_path / "teams.yaml"
    config.write_text("objective:\n  num_separate_layers: 2\n")
    said = run(
        *("from-hf", "--discriminator", tmp_path / "rtd", "--generator", tmp_path / "generator"),
        *("--model", "teams-tiny", "--config", config, "--num-shared-layers", 1, "--output", tmp_path / "start"),
    )
    assert "start afresh: mws_branch.dense, mws_branch.layers.0, mws_branch.layers.1, mws_branch.norm\n" in said
    found = read_checkpoint(tmp_path / "start")
    assert found.objective == OBJECTIVE
    assert found.model.ranker == SHAPE
    assert found.weights.keys() == weights.keys()
    for name, weight in weights.items():
        if not name.startswith("mws_branch."):
            assert torch.equal(found.weights[name], weight), name


def test_an_unknown_branch_is_refused_naming_what_there_is(teams, refusal, tmp_path):
    for flag in ("--branch", "--network"):
        line = refusal("to-hf", "--load", teams[0], flag, "ranker", "--output", tmp_path / "out")
        assert "--branch ranker: this checkpoint has no ranker; it has: rtd, mws, generator" in line


def test_a_parameter_that_no_branch_takes_is_refused(teams, refusal, monkeypatch, tmp_path):
    exports = Teams.exports
    monkeypatch.setattr(Teams, "exports", lambda *args: exports(*args)[:1])
    line = refusal("to-hf", "--load", teams[0], "--output", tmp_path / "out")
    assert "no branch's map takes the parameter generator." in line and "mws_branch.norm.weight" in line


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("family", ["electra", "bert"])
def test_a_generator_may_be_of_either_family(family, run, tmp_path, wordpiece):
    """Where embeddings are as wide as hidden states the two classes are the same function."""
    common = {**SIZES, "vocab_size": wordpiece.vocab_size, "max_position_embeddings": 40}
    torch.manual_seed(3)
    configs = {"electra": ElectraConfig(**common, embedding_size=32), "bert": BertConfig(**common)}
    classes = {"electra": ElectraForMaskedLM, "bert": BertForMaskedLM}
    generator = classes[family](configs[family])
    ElectraForPreTraining(configs["electra"]).save_pretrained(tmp_path / "discriminator")
    generator.save_pretrained(tmp_path / "generator")
    for name in ("discriminator", "generator"):
        wordpiece.save(tmp_path / name)
    pair = ("--discriminator", tmp_path / "discriminator", "--generator", tmp_path / "generator")
    assert "afresh" not in run("from-hf", *pair, "--model", "electra-tiny", "--output", tmp_path / "pair")
    assert "afresh" not in run("from-hf", "--bert", tmp_path / "generator", "--output", tmp_path / "bert")
    state = load_file(tmp_path / "generator/model.safetensors")
    name = f"{family}.encoder.layer.1.output.dense.weight"
    for start in ("pair", "bert"):
        found = read_checkpoint(tmp_path / start).weights["generator.layers.1.feed_forward.down.weight"]
        assert torch.equal(found, state[name])
