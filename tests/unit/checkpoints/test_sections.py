"""The manifest's sections: what is written is what is read, and what is wrong is named."""

import json
from dataclasses import replace

import pytest

from checkpoint_runs import SHAPE, WHOLE
from peer_scale.checkpoints.sections import RecentSteps, parse_sections
from peer_scale.checkpoints.upgrade import from_format_2, with_blocks, with_split
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.samples.masking import MaskingConfig

IMPORTED = replace(
    WHOLE,
    objective=MaskedLanguageModel(),
    model=ModelConfig(SHAPE, None),
    data=None,
    layout=None,
    training=None,
    imported={"generator": "google/x"},
    reshaped=None,
)
# what format 2 said of the hyper-parameters, whatever the model
FORMAT_2 = {
    **{"num_levels": 3, "taus": [1.0], "top_t": 3, "delta": 3.0, "gammas": [0.5], "tqr_weight": 50.0},
    **{"warmup_epochs": 0.8, "mask_fraction": 0.15, "mask_probability": 0.85},
}


def read_back(sections, **changes):
    content = json.loads(json.dumps(sections.as_json()))
    return parse_sections({**content, **changes}, "peer_scale.json")


SKIPS_SPIKES = replace(WHOLE, recent=RecentSteps((1, 2), (0.5, 1 / 3), (1.0, 2e-5)))


@pytest.mark.parametrize("sections", [WHOLE, IMPORTED, SKIPS_SPIKES])
def test_what_is_written_is_what_is_read(sections):
    assert read_back(sections) == sections


def test_what_is_not_there_is_not_written():
    assert WHOLE.as_json().keys() - IMPORTED.as_json().keys() == {"data", "layout", "training", "reshaped"}
    assert IMPORTED.as_json()["objective"] == {"kind": "mlm"}


def test_what_is_wrong_is_named():
    def refused(**changes):
        with pytest.raises(UserError) as error:
            read_back(WHOLE, **changes)
        assert "\n" not in str(error.value)
        return str(error.value)

    content = json.loads(json.dumps(WHOLE.as_json()))
    without_seed = {key: value for key, value in content["data"].items() if key != "seed"}
    assert refused(data=without_seed).startswith("peer_scale.json: data.seed: ")
    assert refused(progress={"step": 3, "samples": 24}) == "peer_scale.json: progress.tokens: missing"
    more = {**content["masking"], "span": 3}
    assert refused(masking=more) == "peer_scale.json: masking.span: unknown to this version"
    assert refused(layout=None) == "peer_scale.json: layout: missing"
    wrong = {**content["model"], "generator": {**content["model"]["generator"], "num_layers": "two"}}
    assert refused(model=wrong).startswith("peer_scale.json: model.generator.num_layers: ")
    line = refused(objective={**content["objective"], "delta": -1.0})
    assert line.startswith("peer_scale.json: objective.delta: ") and "-1.0" in line
    line = refused(objective={**content["objective"], "taus": []})
    assert line == "peer_scale.json: objective: taus []: K = 4 levels take 2 values"
    assert (
        refused(objective={"kind": "mlm", "delta": 1.0}) == "peer_scale.json: objective.delta: unknown to this version"
    )
    assert "known: mlm, tqr" in refused(objective={"kind": "xyz"})
    assert refused(objective=None) == "peer_scale.json: objective.kind: missing"
    assert refused(stray={}) == "peer_scale.json: stray: unknown to this version"


def as_format_2(sections):
    content = json.loads(json.dumps(sections.as_json()))
    content["data"] = {**content.get("data", {}), **{"tokenizer": content.pop("tokenizer")["digest"]}}
    content["data"].pop("split", None)
    del content["masking"]
    return {**content, "objective": FORMAT_2}


@pytest.mark.parametrize(("sections", "objective"), [(WHOLE, TokenQualityRanking()), (IMPORTED, MaskedLanguageModel())])
def test_format_2_becomes_the_present_one(sections, objective):
    found = parse_sections(with_split(from_format_2(as_format_2(sections))), "peer_scale.json")
    data = sections.data and replace(sections.data, split="documents")
    assert found == replace(sections, objective=objective, masking=MaskingConfig(0.15, 0.85), data=data)


def test_data_that_name_no_split_were_split_by_documents():
    content = json.loads(json.dumps(WHOLE.as_json()))
    assert parse_sections(with_split(content), "peer_scale.json").data.split == "tokens"
    del content["data"]["split"]
    assert parse_sections(with_split(content), "peer_scale.json").data.split == "documents"
    imported = IMPORTED.as_json()
    assert with_split(imported) == imported
    with pytest.raises(UserError, match=r"peer_scale\.json: data\.split: .*'words'"):
        parse_sections({**content, "data": {**content["data"], "split": "words"}}, "peer_scale.json")


def test_an_import_of_format_2_says_nothing_of_random_streams():
    content = as_format_2(IMPORTED)
    content["random"] = {"seed": 7}
    assert parse_sections(from_format_2(content), "peer_scale.json").random.seed == 7


def test_a_model_of_before_there_were_blocks_to_choose_from_has_berts():
    model = WHOLE.as_json()["model"]
    assert with_blocks({"model": {**model, "activation": "geglu"}})["model"]["activation"] == "geglu"
    added = {name for name in model if name not in MODEL_OF_BEFORE}
    before = {name: value for name, value in model.items() if name not in added}
    assert with_blocks({"model": before}) == {"model": model}
    assert "norm_position" in added and "init_std" not in added


MODEL_OF_BEFORE = (
    *("generator", "ranker", "num_shared_layers", "vocab_size", "embedding_size", "max_position_embeddings"),
    *("num_token_types", "hidden_dropout", "attention_dropout", "init_std", "layer_norm_eps"),
)
