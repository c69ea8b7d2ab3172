"""Which runs may go on from a checkpoint: every difference is named, and imported weights go on with more of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoint_runs import SHAPE, WHOLE
from peer_scale.checkpoints.identity import changes, check_identity, with_split_of
from peer_scale.checkpoints.manifest import Manifest, TensorEntry
from peer_scale.checkpoints.parameters import shardings
from peer_scale.errors import UserError
from peer_scale.models.config import ModelConfig
from peer_scale.objectives.masked_lm import MaskedLanguageModel
from peer_scale.objectives.tqr import TokenQualityRanking
from peer_scale.parallel.topology import single_process_topology
from peer_scale.samples.masking import MaskingConfig

MODEL = ModelConfig(SHAPE, SHAPE, num_shared_layers=1, vocab_size=30, embedding_size=8, max_position_embeddings=16)
RUN = replace(WHOLE, model=MODEL, objective=TokenQualityRanking(), reshaped=None)
IMPORTED = replace(RUN, data=None, layout=None, training=None, imported={"ranker": "x/y"})


@pytest.fixture
def ranks():
    return single_process_topology().tensor_parallel


@pytest.fixture
def difference(ranks):
    """Give what is said of the fields in which a run differs from a checkpoint; None where it may go on."""

    def difference(saved, own):
        found = shardings(saved.model, saved.objective, ranks)
        tensors = {name: TensorEntry(s.shape, s.dim, s.count, s.padding, ()) for name, s in found.items()}
        try:
            check_identity(Path("save"), Manifest(saved, tensors, {}), own, ranks)
        except UserError as error:
            return re.fullmatch("--load save: saved by another run: (.*)", str(error))[1]
        return None

    return difference


def test_a_run_goes_on_from_its_own(difference):
    assert difference(RUN, RUN) is None
    other_layout = replace(RUN.layout, tensor_parallel=2, zero_stage=1)
    assert difference(RUN, replace(RUN, layout=other_layout, training={"lr": 1.0})) is None


def test_the_split_is_the_checkpoints(difference):
    """A run that would split otherwise goes on, and holds out what the checkpoint's run did."""
    earlier = replace(RUN, data=replace(RUN.data, split="documents"))
    assert RUN.data.split == "tokens"
    assert difference(earlier, RUN) is None
    assert with_split_of(Manifest(earlier, {}, {}), RUN) == earlier
    assert with_split_of(Manifest(RUN, {}, {}), RUN) == RUN
    assert with_split_of(Manifest(IMPORTED, {}, {}), RUN) == RUN


def test_every_difference_is_named(difference):
    data = replace(RUN.data, seed=5, seq_length=32)
    own = replace(RUN, data=data, masking=MaskingConfig(0.3, 0.85), objective=TokenQualityRanking(delta=9.0))
    assert difference(RUN, own) == (
        "data.seed 1234 there, 5 here; data.seq_length 64 there, 32 here; masking.mask_fraction 0.2 there, 0.3 here; "
        "objective.delta 3.0 there, 9.0 here"
    )
    dropout = replace(RUN, model=replace(MODEL, hidden_dropout=0.0))
    assert difference(RUN, dropout) == "model.hidden_dropout 0.1 there, 0.0 here"
    bert = replace(RUN, objective=MaskedLanguageModel(), model=replace(MODEL, ranker=None, num_shared_layers=0))
    assert "objective.kind tqr there, mlm here" in difference(RUN, bert)


def test_imported_weights_go_on_with_other_data_dropout_and_hyper_parameters(difference):
    model = replace(MODEL, hidden_dropout=0.0, attention_dropout=0.0, init_std=0.1)
    objective = TokenQualityRanking(num_levels=3, taus=(2.0,), delta=0.0, tqr_weight=20.0)
    assert difference(IMPORTED, replace(RUN, model=model, objective=objective, masking=MaskingConfig(0.3))) is None


def test_imported_weights_go_on_with_their_own_model_and_tokenizer_alone(difference):
    heads = replace(MODEL.generator, num_attention_heads=4)
    assert (
        difference(IMPORTED, replace(RUN, model=replace(MODEL, generator=heads, ranker=heads)))
        == "model.generator.num_attention_heads 2 there, 4 here; model.ranker.num_attention_heads 2 there, 4 here"
    )
    assert difference(IMPORTED, replace(RUN, tokenizer=replace(RUN.tokenizer, digest="xyz"))) == (
        "tokenizer.digest abc there, xyz here"
    )


def test_imported_weights_go_on_with_an_objective_of_the_same_parameters_alone(difference):
    electra = replace(RUN, objective=TokenQualityRanking(num_levels=2, taus=()))
    assert difference(IMPORTED, electra) == "ranking_head.free_thresholds [2] there, [1] here"


def test_what_changed_of_layout_and_training_is_told():
    own = replace(
        RUN, layout=replace(RUN.layout, tensor_parallel=2, zero_stage=1), training={**RUN.training, "lr": 0.5}
    )
    assert changes(Manifest(RUN, {}, {}), own) == "tensor_parallel 1 -> 2, zero_stage 3 -> 1, lr 0.001 -> 0.5"
    assert changes(Manifest(RUN, {}, {}), RUN) == ""
