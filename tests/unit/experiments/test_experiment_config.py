"""Experiment files: what they may say, and the one line for what they may not."""

import pytest

from peer_scale.errors import UserError
from peer_scale.experiments.config import flat, merged
from peer_scale.experiments.measures import measurements, measures, with_averages
from peer_scale.experiments.reading import read_experiment

GOOD = """
name: small
seeds: [1, 2]
budget: {flops: 1.0e14}
common: {training: {seq_length: 64}}
arms:
  - {name: bert, label: BERT, model: bert-tiny}
  - {name: peer, model: peer-tiny, changes: {objective: {delta: 1}}}
  - {name: random, model: peer-tiny, kind: random}
  - {name: tfidf, kind: tfidf}
ablations:
  - {name: levels, of: peer, arms: [{name: peer-k4, changes: {objective: {num_levels: 4, taus: [1, 10]}}}]}
tasks: [cola, {name: own, path: x/y, options: {epochs: 3}}]
probe: {}
finetune: {sizes: [1000, all], options: {recipe: electra}}
held_out: [{metric: validation_mlm_loss, higher_is_better: false}]
"""


@pytest.fixture
def read(tmp_path):
    def read(text=GOOD, *changes):
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return read_experiment(path)

    return read


def test_arms_seeds_and_families(read):
    config = read()
    assert [arm.name for arm in config.all_arms] == ["bert", "peer", "random", "tfidf", "peer-k4"]
    assert {arm.name: config.seeds_of(arm) for arm in config.all_arms} == {
        **dict.fromkeys(("bert", "peer", "random", "peer-k4"), (1, 2)),
        "tfidf": (1,),
    }
    assert config.families == {"arms": ("bert", "peer"), "levels": ("peer", "peer-k4")}


def test_a_variant_has_its_base_s_settings_and_its_own_on_top(read):
    variant = read().all_arms[-1]
    assert variant.model == "peer-tiny"
    assert variant.changes == {"objective": {"delta": 1, "num_levels": 4, "taus": [1, 10]}}


def test_measures_are_listed_by_groups_with_their_means(read):
    assert [measure.name for measure in measures(read())] == [
        *("probe/cola", "probe/own", "probe/average"),
        *("finetune-1000/cola", "finetune-1000/own", "finetune-1000/average"),
        *("finetune-all/cola", "finetune-all/own", "finetune-all/average"),
        "held-out/validation_mlm_loss",
    ]


def test_a_task_s_options_win(read):
    found = {each.measure: each.options for each in measurements(read())}
    assert found["finetune-all/own"] == {"recipe": "electra", "epochs": 3}
    assert found["finetune-all/cola"] == {"recipe": "electra"}


def test_means_need_all_their_tasks(read):
    scores = with_averages(read(), {"probe/cola": 0.5, "probe/own": 0.75, "finetune-all/cola": 0.5})
    assert scores["probe/average"] == 0.625
    assert scores["finetune-all/average"] is None


def test_merging_and_flattening():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, None, {"a": {"c": 4}, "d": {"e": 5}}) == {
        "a": {"b": 1, "c": 4},
        "d": {"e": 5},
    }
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": [3]}) == {"a.b": 1, "a.c.d": 2, "e": [3]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("name: small", "nam: small"), "unknown key nam; did you mean name?"),
        (("name: small\n", ""), "needs name"),
        (("1.0e14", "-1"), "budget.flops is -1; it must be a number above 0"),
        (("1.0e14}", "1.0e14, accounting: all}"), "budget.accounting is all; it must be one of paper, actual"),
        (("budget: {flops: 1.0e14}\n", ""), "arm bert has no steps, and there is no budget"),
        (("seeds: [1, 2]", "seeds: []"), "seeds is []; it must be one or more whole numbers"),
        (("seeds: [1, 2]", "seeds: [1, 1]"), "arm bert: seed 1 stands twice"),
        (("name: bert, label", "name: peer, label"), "arms: peer stands twice"),
        (("name: bert, label", "name: a/b, label"), "arms[0]: name is a/b; it must be letters"),
        (("model: bert-tiny", "modle: bert-tiny"), "unknown key arms[0].modle; did you mean model?"),
        (("label: BERT, model: bert-tiny", "label: BERT"), "arm bert needs a model"),
        (("kind: tfidf", "kind: tfidf, steps: 3"), "arm tfidf is tfidf, which has no model, branch, steps or changes"),
        (("of: peer", "of: pear"), "ablation levels: no arm pear; did you mean peer?"),
        (("seq_length: 64", "train_iters: 64"), "common.training.train_iters: cannot be set here: the budget"),
        (("{delta: 1}", "[delta]"), None),
        (("tasks: [cola,", "tasks: [average,"), "a task cannot be called average"),
        (("tasks: [cola, {name: own, path: x/y, options: {epochs: 3}}]\n", ""), "tasks go with probe or finetune"),
        (("sizes: [1000, all]", "sizes: [0]"), "finetune.sizes is [0]"),
        (("probe: {}", "probe: yes please"), "probe must be a mapping, not yes please"),
        (("tasks: [", "primary: probe/colla\ntasks: ["), "primary: no measure probe/colla; did you mean probe/cola?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_that_names_it(read, change, said):
    if said is None:
        read(GOOD, change)  # what is within settings is the trainer's to check
        return
    with pytest.raises(UserError) as error:
        read(GOOD, change)
    assert "x.yaml" in str(error.value)
    assert said in str(error.value)


def test_an_empty_file_is_no_experiment(read):
    with pytest.raises(UserError, match="must be a mapping, not null"):
        read("")
