"""ModernBERT folders: what transformers made goes in and comes out again, a trained pair opens in transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForTokenClassification,
)

from checkpoint_runs import write_random
from peer_scale.checkpoints.reader import read_checkpoint
from peer_scale.models.config import EncoderShape, ModelConfig
from peer_scale.objectives.tqr import TokenQualityRanking

pytestmark = pytest.mark.heavy

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "local_attention": 10,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "cls_token_id": None,
    "sep_token_id": None,
}
UNUSED = ("local_attention", "rope_parameters")  # in part, where no layer is local
SHAPE = EncoderShape(num_layers=3, hidden_size=24, ffn_hidden_size=20, num_attention_heads=3)
PEER = TokenQualityRanking()


@pytest.fixture
def pair(wordpiece):
    """A function that writes a pair's checkpoint of random numbers, with ModernBERT's blocks or changes of them."""

    def write(folder, **changes):
        model = ModelConfig(
            generator=replace(SHAPE, num_layers=2),
            ranker=SHAPE,
            num_shared_layers=1,
            vocab_size=wordpiece.vocab_size,
            embedding_size=24,
            max_position_embeddings=40,
            num_token_types=0,
            position_embedding="rotary",
            attention_window=6,
            global_attention_every_n=2,
            norm_position="pre",
            norm_bias=False,
            activation="geglu",
            linear_bias=False,
        )
        model = replace(model, **changes)
        return write_random(folder, model, PEER, "ranker", wordpiece)

    return write


def save(model, folder, wordpiece):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases and norms too, so that a swapped pair shows
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(folder)
    wordpiece.save(folder)


def assert_same_file(before, after):
    before, after = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert {*before} - {*after} <= {"decoder.weight"}, "tied"
    assert {*after} <= {*before}
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 4},
        {
            **{"num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
            **{"norm_bias": True, "hidden_activation": "silu", "layer_types": ["full_attention"] * 3},
        },
    ],
)
def test_a_masked_language_model_goes_in_and_comes_out_bit_for_bit(changes, run, tmp_path, wordpiece):
    config = ModernBertConfig(**COMMON, vocab_size=wordpiece.vocab_size, **changes)
    save(ModernBertForMaskedLM(config), tmp_path / "in", wordpiece)
    said = run("from-hf", "--bert", tmp_path / "in", "--model", "bert-tiny", "--output", tmp_path / "start")
    assert "logits equal to transformers'" in said and "afresh" not in said
    run("to-hf", "--load", tmp_path / "start", "--output", tmp_path / "out")
    assert_same_file(tmp_path / "in", tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "out"))
    assert {key for key in before if before[key] != after.get(key)} <= {"dtype", "transformers_version", *UNUSED}


def test_a_pair_opens_in_transformers_and_comes_back_bit_for_bit(pair, run, tmp_path):
    weights = pair(tmp_path / "pair")
    for network in ("ranker", "generator"):
        said = run("to-hf", "--load", tmp_path / "pair", "--network", network, "--output", tmp_path / network)
        assert "logits equal to our model's" in said
    for cls, network in ((ModernBertForTokenClassification, "ranker"), (ModernBertForMaskedLM, "generator")):
        model, report = cls.from_pretrained(tmp_path / network, output_loading_info=True)
        assert not any(report.values())
        assert torch.isfinite(
            model(**AutoTokenizer.from_pretrained(tmp_path / network)("A logger.", return_tensors="pt")).logits
        ).all()
        if network == "ranker":
            assert model.config.id2label == {0: "original", 1: "replaced"}
    said = run(
        *("from-hf", "--discriminator", tmp_path / "ranker", "--generator", tmp_path / "generator"),
        *("--model", "peer-tiny", "--num-shared-layers", 1, "--output", tmp_path / "start"),
    )
    assert "afresh" not in said
    found = read_checkpoint(tmp_path / "start")
    assert found.weights.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(found.weights[name], weight), name


def test_a_model_that_transformers_has_no_class_for_is_refused(pair, refusal, tmp_path):
    pair(tmp_path / "pair", position_embedding="t5_bias")
    line = refusal("to-hf", "--load", tmp_path / "pair", "--output", tmp_path / "out")
    assert "transformers has no class for this model" in line and "position_embedding t5_bias" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier_activation": "silu"}, "classifier_activation is 'silu', which"),
        ({"mlp_bias": True}, "attention_bias, mlp_bias and classifier_bias differ"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types have no global layer first"),
        ({"local_attention": 7}, "local_attention is 7, an odd number"),
    ],
)
def test_what_the_models_here_do_not_compute_is_refused(changes, message, refusal, tmp_path, wordpiece):
    config = {**COMMON, "num_hidden_layers": 2, "vocab_size": wordpiece.vocab_size, **changes}
    ModernBertConfig(**config, architectures=["ModernBertForMaskedLM"]).save_pretrained(tmp_path / "in")
    line = refusal("from-hf", "--bert", tmp_path / "in", "--output", tmp_path / "out")
    assert message in line
