"""The recipes' values, schedules, rates and optimizer against what is written out by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)

from peer_scale.finetuning.layerwise import exponent, parameter_groups
from peer_scale.finetuning.optimizer import UncorrectedAdam
from peer_scale.finetuning.recipes import rate_factor, recipe_for
from peer_scale.finetuning.tasks import GLUE

SMALL_TASKS = {"cola", "mrpc", "stsb", "rte"}
# lr of ELECTRA's optimization.py for 12 layers: d to the power of
OFFICIAL = {"head": 0, 11: 2, 10: 3, 9: 4, 8: 5, 7: 6, 6: 7, 5: 8, 4: 9, 3: 10, 2: 11, 1: 12, 0: 13, "embeddings": 14}
FIXED = {"head": 0, 11: 1, 10: 2, 9: 3, 8: 4, 7: 5, 6: 6, 5: 7, 4: 8, 3: 9, 2: 10, 1: 11, 0: 12, "embeddings": 13}


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize(("hidden_size", "lrs"), [(256, (1e-4, 7.5e-5)), (768, (5e-5, 3e-5))])
def test_table_9(name, hidden_size, lrs):
    recipe = recipe_for("paper", hidden_size=hidden_size, task=name, train_size=GLUE[name].sizes[0])
    assert recipe.lrs == lrs
    assert (recipe.epochs, recipe.best_epoch) == ((20, True) if name in SMALL_TASKS else (4, False))
    assert recipe.num_seeds == (5 if name in SMALL_TASKS else 3 if name in ("qnli", "sst2") else 1)
    assert (recipe.adam_eps, recipe.adam_beta1, recipe.adam_beta2, recipe.warmup) == (1e-6, 0.9, 0.999, 0.1)
    assert (recipe.dropout, recipe.attention_dropout, recipe.weight_decay, recipe.layerwise) == (0.1, 0.1, 0.0, "none")
    assert recipe.batch_size in (16, 32)


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize(("hidden_size", "lr", "decay"), [(256, 3e-4, 0.8), (768, 1e-4, 0.8), (1024, 5e-5, 0.9)])
def test_electras_own(name, hidden_size, lr, decay):
    recipe = recipe_for("electra", hidden_size=hidden_size, task=name, train_size=GLUE[name].sizes[0])
    assert (recipe.lrs, recipe.layerwise, recipe.layerwise_decay) == ((lr,), "official", decay)
    assert (recipe.epochs, recipe.best_epoch) == (10 if name in ("rte", "stsb") else 3, False)
    assert (recipe.batch_size, recipe.adam_eps, recipe.has_bias_correction) == (32, 1e-6, False)


def test_schedules():
    paper = recipe_for("paper", hidden_size=256, task="cola", train_size=1)
    factors = [rate_factor(paper, 25)(step) for step in range(25)]
    wanted = [step / 3 if step < 3 else (25 - step) / 22 for step in range(25)]  # ceil(0.1 * 25) = 3
    np.testing.assert_allclose(factors, wanted)
    electra = recipe_for("electra", hidden_size=256, task="cola", train_size=1)
    factors = [rate_factor(electra, 100)(step) for step in range(100)]
    np.testing.assert_allclose(factors, [(1 - t / 100) * min(1, t / 10) for t in range(100)])
    assert max(factors) == pytest.approx(0.9)
    assert factors[0] == 0


def groups_of(name):
    return "embeddings" if "embeddings" in name else int(name.split(".")[3]) if ".layer." in name else "head"


@pytest.mark.parametrize(("is_fixed", "table"), [(False, OFFICIAL), (True, FIXED)])
def test_layerwise_rates_of_12_layers(is_fixed, table):
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4, "vocab_size": 8}
    with torch.device("meta"):
        model = ElectraForSequenceClassification(ElectraConfig(num_hidden_layers=12, embedding_size=2, **sizes))
    found = {}
    for name, _ in model.named_parameters():
        power = exponent(name, prefix="electra", num_layers=12, is_fixed=is_fixed)
        assert found.setdefault(groups_of(name), power) == power, name
    assert found == table

    recipe = recipe_for("electra", hidden_size=4, task="cola", train_size=1)
    recipe = dataclasses.replace(recipe, layerwise="fixed" if is_fixed else "official")
    decayed = {name for name, _ in model.named_parameters() if name.endswith("weight") and "LayerNorm" not in name}
    groups = parameter_groups(model, recipe, 1e-4, decayed)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        rate, decay = rates[id(parameter)]
        assert math.isclose(rate, 1e-4 * 0.8 ** table[groups_of(name)])
        assert decay == (0.01 if name in decayed else 0.0)


def test_layerwise_rates_of_other_families():
    sizes = {
        "hidden_size": 4,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "intermediate_size": 4,
        "vocab_size": 8,
    }
    with torch.device("meta"):
        bert = BertForSequenceClassification(BertConfig(**sizes))
        modern = ModernBertForSequenceClassification(ModernBertConfig(**sizes, pad_token_id=0))
    powers = {
        name: exponent(name, prefix=model.base_model_prefix, num_layers=3, is_fixed=True)
        for model in (bert, modern)
        for name, _ in model.named_parameters()
    }
    wanted = {
        "bert.embeddings.LayerNorm.bias": 4,
        "bert.encoder.layer.0.output.dense.weight": 3,
        "bert.encoder.layer.2.output.dense.weight": 1,
        "bert.pooler.dense.weight": 0,
        "classifier.weight": 0,
        "model.embeddings.tok_embeddings.weight": 4,
        "model.layers.0.mlp.Wi.weight": 3,
        "model.layers.2.mlp.Wi.weight": 1,
        "model.final_norm.weight": 1,
        "head.dense.weight": 0,
    }
    assert {name: powers[name] for name in wanted} == wanted


def test_uncorrected_adam():
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(3, 2)), rng.normal(size=(6, 3, 2))
    lr, (beta1, beta2), eps, decay = 0.01, (0.9, 0.999), 1e-6, 0.1
    p, m, v = start.copy(), np.zeros((3, 2)), np.zeros((3, 2))
    for g in gradients:  # google-research's AdamWeightDecayOptimizer
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = p - lr * (m / (np.sqrt(v) + eps) + decay * p)
    parameter = torch.nn.Parameter(torch.tensor(start))
    still = torch.nn.Parameter(torch.ones(2))
    optimizer = UncorrectedAdam([parameter, still], lr, (beta1, beta2), eps, decay)
    for g in gradients:
        parameter.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), p, rtol=1e-12)
    assert still.eq(1).all(), "what has no gradient stays"
