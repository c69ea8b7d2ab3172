"""The comparison made of results, wherever they come from; which runs are left to do."""

import json
import shutil
from dataclasses import replace

import pytest
from scipy.stats import ttest_ind

from peer_scale.errors import UserError
from peer_scale.experiments.comparison import FILE, compare, sentence, table, write_comparison
from peer_scale.experiments.plan import RunName, make_plan
from peer_scale.experiments.processes import Programs
from peer_scale.experiments.reading import read_experiment
from peer_scale.experiments.results import RunResult, read_results, write_result
from peer_scale.experiments.run import Conductor

FILE_TEXT = """
name: made-up
title: Made up
seeds: [1, 2, 3]
budget: {flops: 1.0e13}
arms:
  - {name: bert, label: BERT, model: bert-tiny}
  - {name: electra, label: ELECTRA, model: electra-tiny}
  - {name: peer, label: PEER, model: peer-tiny, changes: {objective: {delta: 2}}}
  - {name: random, model: peer-tiny, kind: random}
ablations:
  - {name: levels, of: peer, arms: [{name: peer-k4, changes: {objective: {num_levels: 4, taus: [1, 10]}}}]}
tasks: [cola, rte]
finetune: {}
held_out: [{metric: validation_mlm_loss, higher_is_better: false}]
paper:
  table: Table 0
  rows: {peer: {finetune-all/cola: 59.7, finetune-all/average/std: 0.25, train_flops: 1.0e18}}
"""
# by pre-training seed; the means over the two tasks are 0.1 higher, as rte is 0.2 above cola
COLA = {
    "bert": [0.50, 0.52, 0.51],
    "electra": [0.60, 0.64, 0.62],
    "peer": [0.62, 0.66, 0.63],
    "random": [0.0, 0.01, 0.02],
    "peer-k4": [0.61, 0.63, 0.66],
}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "made-up.yaml"
    path.write_text(FILE_TEXT)
    return make_plan(read_experiment(path), path, None)


def result_of(plan, run):
    cola = COLA[run.arm][run.seed - 1]
    scores = {"finetune-all/cola": cola, "finetune-all/rte": cola + 0.2, "finetune-all/average": cola + 0.1}
    return RunResult(
        "made-up",
        run.arm,
        run.seed,
        plan.arms[run.arm].fingerprint,
        steps=plan.arms[run.arm].steps,
        curve=[{"step": 1, "tokens": 10}],
        scores={**scores, "held-out/validation_mlm_loss": None if run.arm == "random" else 5.0 + run.seed},
        details={"measures": {"finetune-all/cola": {"metric": "mcc"}}, "checkpoints": []},
        provenance={"data_fingerprint": "text"},
    )


def write_all(folder, plan, without=()):
    for run in plan.runs:
        if str(run) not in without:
            write_result(folder, result_of(plan, run))


def comparison_of(folder, plan):
    return compare(plan, read_results(folder, plan))


def test_pairs_are_tested_within_families_alone(tmp_path, plan):
    write_all(tmp_path, plan)
    comparison = comparison_of(tmp_path, plan)
    assert comparison.missing == comparison.incomplete == ()
    of_cola = [test for test in comparison.tests if test.measure == "finetune-all/cola"]
    assert [(test.family, test.a, test.b) for test in of_cola] == [
        ("arms", "bert", "electra"),
        ("arms", "bert", "peer"),
        ("arms", "electra", "peer"),
        ("levels", "peer", "peer-k4"),
    ]
    expected = [ttest_ind(COLA[test.a], COLA[test.b], equal_var=False).pvalue for test in of_cola]
    assert [test.p for test in of_cola] == pytest.approx(expected)
    ranked = sorted(expected[:3])
    by_hand = {ranked[0]: 3 * ranked[0], ranked[1]: max(3 * ranked[0], 2 * ranked[1]), ranked[2]: ranked[2]}
    assert [test.p_holm for test in of_cola[:3]] == pytest.approx([by_hand[p] for p in expected[:3]])
    assert of_cola[3].p_holm == of_cola[3].p


def test_the_result_in_one_sentence(tmp_path, plan):
    write_all(tmp_path, plan)
    comparison = comparison_of(tmp_path, plan)
    assert sentence(comparison) == (
        "PEER has the best mean of 2 tasks (finetune-all), 73.67 ± 2.08 over 3 pre-training seeds, significantly "
        "different from BERT at the 5% level (Welch's t, Holm), not from ELECTRA."
    )
    header, *rows = table(comparison).splitlines()
    assert header.split() == ["BERT", "ELECTRA", "PEER", "random", "peer-k4"]
    assert "63.67 ± 2.08 (paper 59.7)" in next(row for row in rows if row.startswith("finetune-all: cola"))


def test_lower_is_better_where_that_is_said(tmp_path, plan):
    write_all(tmp_path, plan)
    results = read_results(tmp_path, plan)
    better = {run: _with_loss(result, 1.0 if run.arm == "bert" else 2.0) for run, result in results.items()}
    config = replace(plan.config, primary="held-out/validation_mlm_loss")
    assert sentence(compare(replace(plan, config=config), better)).startswith("BERT has the best validation_mlm_loss")


def _with_loss(result, value):
    return replace(result, scores={**result.scores, "held-out/validation_mlm_loss": value + result.seed / 100})


def test_what_is_missing_is_named_and_the_rest_compared(tmp_path, plan):
    write_all(tmp_path, plan, without=("peer-s2", "bert-s1", "bert-s2"))
    comparison = comparison_of(tmp_path, plan)
    assert [str(run) for run in comparison.missing] == ["bert-s1", "bert-s2", "peer-s2"]
    assert comparison.scores["finetune-all/cola"]["peer"] == [0.62, None, 0.63]
    (pair,) = [t for t in comparison.tests if t.measure == "finetune-all/cola" and (t.a, t.b) == ("electra", "peer")]
    assert pair.t == pytest.approx(ttest_ind(COLA["electra"], [0.62, 0.63], equal_var=False).statistic)
    assert sentence(comparison).endswith("(3 runs are missing).")


def test_what_cannot_be_tested_is_not_called_the_same(tmp_path, plan):
    (tmp_path / "one").mkdir()
    write_all(tmp_path / "one", plan, without=[str(run) for run in plan.runs if run.seed > 1])
    assert ", not tested against ELECTRA or BERT: that takes two seeds of each that differ" in sentence(
        comparison_of(tmp_path / "one", plan)
    )
    write_all(tmp_path, plan, without=("electra-s2", "electra-s3"))
    assert "different from BERT at the 5% level (Welch's t, Holm), not tested against ELECTRA: that takes" in sentence(
        comparison_of(tmp_path, plan)
    )


def test_without_results_nothing_is_claimed(tmp_path, plan):
    comparison = comparison_of(tmp_path, plan)
    write_comparison(tmp_path, comparison)
    assert sentence(comparison) == "No run has a value of mean of 2 tasks (finetune-all) yet."
    assert len(json.loads((tmp_path / FILE).read_text())["missing"]) == 15


def test_the_file_of_the_comparison(tmp_path, plan):
    write_all(tmp_path, plan, without=("peer-s3",))
    (tmp_path / "runs" / "peer-s1" / "log").mkdir(parents=True)
    write_comparison(tmp_path, comparison_of(tmp_path, plan))
    content = json.loads((tmp_path / FILE).read_text())
    assert (content["name"], content["title"], content["missing"]) == ("made-up", "Made up", ["peer-s3"])
    assert content["budget"] == {"flops": 1e13, "accounting": "paper"}
    peer = next(arm for arm in content["arms"] if arm["name"] == "peer")
    assert (peer["label"], peer["seeds"]) == ("PEER", [1, 2, 3])
    assert peer["changes"] == {"model": "peer-tiny", "objective.delta": 2}
    assert [run["log_dir"] for run in peer["runs"]] == ["runs/peer-s1/log", None]
    assert peer["runs"][0]["curve"] == [{"step": 1, "tokens": 10}]
    measures = {measure["name"]: measure for measure in content["measures"]}
    assert measures["finetune-all/cola"] == {
        "name": "finetune-all/cola",
        "label": "cola",
        "metric": "mcc",
        "higher_is_better": True,
        "group": "finetune-all",
    }
    assert not measures["held-out/validation_mlm_loss"]["higher_is_better"]
    assert content["scores"]["finetune-all/rte"]["peer"] == [0.62 + 0.2, 0.66 + 0.2, None]
    assert {"measure", "a", "b", "difference", "t", "df", "p", "p_holm", "significant"} <= content["tests"][0].keys()
    assert content["paper"]["table"] == "Table 0"
    row = content["paper"]["rows"]["peer"]
    # scores as ours are, from 0 to 1
    assert row == pytest.approx({"finetune-all/cola": 0.597, "finetune-all/average/std": 0.0025, "train_flops": 1e18})


def test_results_of_another_machine_are_taken_up(tmp_path, plan):
    here, there = tmp_path / "here", tmp_path / "there"
    write_all(here, plan, without=("peer-s3",))
    there.mkdir()
    write_result(there, result_of(plan, RunName("peer", 3)))
    conductor = Conductor(plan, here, Programs(one_thread=True))
    assert [run for run in plan.runs if not conductor.is_done(run)] == [RunName("peer", 3)]
    shutil.copy(there / "results" / "peer-s3.json", here / "results")
    assert all(conductor.is_done(run) for run in plan.runs)
    assert conductor.run_all(plan.runs, jobs=2) == {}  # there is nothing to run
    assert json.loads((here / FILE).read_text())["missing"] == []


def test_results_of_other_settings_are_refused(tmp_path, plan):
    write_all(tmp_path, plan)
    write_result(tmp_path, replace(result_of(plan, RunName("peer", 1)), fingerprint="another"))
    with pytest.raises(UserError, match=r"peer-s1\.json: made with other settings of arm peer"):
        read_results(tmp_path, plan)


def test_results_of_another_text_are_refused(tmp_path, plan):
    write_all(tmp_path, plan)
    write_result(tmp_path, replace(result_of(plan, RunName("peer", 3)), provenance={"data_fingerprint": "other"}))
    with pytest.raises(UserError, match="bert-s1 and peer-s3 were pre-trained on different texts"):
        read_results(tmp_path, plan)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"arm": "peer"}', '{"experiment": "x", "arm": "bert", "seed": 1, "fingerprint": ""}']
)
def test_files_that_are_no_results_are_named(tmp_path, plan, content):
    write_all(tmp_path, plan)
    (tmp_path / "results" / "peer-s1.json").write_text(content)
    (tmp_path / "results" / "unknown-s1.json").write_text("")  # another experiment's
    with pytest.raises(UserError, match=r"peer-s1\.json"):
        read_results(tmp_path, plan)


def test_a_measure_that_was_added_later_is_said_to_be_lacking(tmp_path, plan):
    write_all(tmp_path, plan)
    path = tmp_path / "more.yaml"
    path.write_text(FILE_TEXT.replace("tasks: [cola, rte]", "tasks: [cola, rte, sst2]"))
    more = make_plan(read_experiment(path), path, None)
    comparison = comparison_of(tmp_path, more)
    assert (len(comparison.incomplete), comparison.missing) == (15, ())
    assert comparison.scores["finetune-all/sst2"]["peer"] == [None, None, None]
    # the models are not here: there is nothing that could be done
    assert all(Conductor(more, tmp_path, Programs(one_thread=True)).is_done(run) for run in more.runs)
