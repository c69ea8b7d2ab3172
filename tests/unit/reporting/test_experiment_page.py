"""The page of an experiment: every number of its file, with intervals by scipy."""

import json

import numpy as np
import pytest
from scipy import stats

from made_experiment import ARMS, write_experiment
from peer_scale.commands.report import main
from peer_scale.reporting.experiments import confidence_interval, interval_of_mean, read_experiment
from report_pages import Parsed, check_figures, log_folder, records, values_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment") / "made"


@pytest.fixture(scope="module")
def content(folder):
    return write_experiment(folder)


@pytest.fixture(scope="module")
def page(folder, content) -> Parsed:
    output = folder.parent / "page.html"
    assert main([str(folder), "--output", str(output)]) == 0
    assert output.stat().st_size < 6_000_000
    return Parsed(output.read_text(encoding="utf-8"))


def test_tables(page, content):
    check_figures(page)
    assert "Made-up numbers, which say nothing of any model." in "".join(page.text)
    header, *rows = page.tables["scores"]
    assert header == ["", *ARMS.values()]
    scores = {row[0]: row[1:] for row in rows}
    values = 100 * np.array(content["scores"]["finetune-1000/topics"]["bert"])
    assert (
        scores["topics, accuracy (fine-tuning, 1,000 examples)"][0]
        == f"{values.mean():.1f} ± {values.std(ddof=1):.1f} (5)"
    )
    assert scores["topics, accuracy (linear probe)"][2].endswith("(4, 1 missing)")
    assert scores["loss (held-out text)"][3] == "–"
    assert ["model", "bert", "electra", "peer", "–"] in page.tables["differences"]
    assert page.tables["paper"][1][0] == "PEER, K = 3" and page.tables["paper"][1][3] == "80.00 ± 1.00"
    test = next(row for row in page.tables["tests"] if row[0].endswith("− BERT") and row[1].startswith("topics"))
    assert test[-2:] == ["0.040", "yes"]
    means = page.tables["tests_of_means"][1:]  # what many rows have folded up is in sight for the means
    assert len(means) == 2 * 3 and all(row[1].startswith("average") for row in means)
    assert all(row in page.tables["tests"] for row in means)
    assert "Not there yet: peer-s5." in "".join(page.text)


def test_intervals_are_those_of_welchs_test(folder, content):
    experiment = read_experiment(folder)
    for test in content["tests"]:
        factor = 1 if test["measure"] == "held-out/loss" else 100
        a, b = ([factor * v for v in content["scores"][test["measure"]][test[side]] if v is not None] for side in "ab")
        expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
        assert confidence_interval(experiment, test) == pytest.approx((expected.low, expected.high), rel=1e-9)
    low, high = stats.t.interval(0.95, len(a) - 1, np.mean(a), stats.sem(a))
    assert interval_of_mean(np.array([*a, np.nan])) == pytest.approx((high - low) / 2)
    assert interval_of_mean(np.array([1.0])) == 0


def test_figures(page, content):
    titles = {figure["title"] for figure in page.data["figures"]}
    assert {"Linear probe", "Fine-tuning, 1,000 examples", "Fine-tuning, all examples", "Held-out text: loss"} <= titles
    assert {"PEER, K = 3 minus BERT", "PEER, K = 3 minus BERT, losses", "MLM accuracy"} <= titles
    forest = page.figure("PEER, K = 3 minus ELECTRA")["data"][0]
    tests = [t for t in content["tests"] if t["b"] == "electra" and t["measure"] != "held-out/loss"]
    assert values_of(forest["x"]) == pytest.approx([100 * test["difference"] for test in tests])
    lines = page.figure("Fine-tuning, all examples, mean against FLOPs, the paper's accounting")["data"]
    means = [trace for trace in lines if "markers" in trace["mode"]]
    assert [trace["name"] for trace in means] == ["BERT", "ELECTRA", "PEER, K = 3"]
    assert values_of(means[0]["x"]) == pytest.approx([7.5e13, 1.5e14, 2.25e14, 3e14])
    assert values_of(means[0]["y"]) == pytest.approx([55, 60, 65, 70])


def test_runs_whose_logs_are_here_are_read_from_them(tmp_path):
    content = write_experiment(tmp_path / "made")
    content["arms"][0]["runs"][0]["log_dir"] = "runs/bert-s1/log"
    (tmp_path / "made" / "experiment.json").write_text(json.dumps(content))
    log_folder(tmp_path / "made" / "runs/bert-s1/log", records(range(1, 301)))
    first, second, *_ = read_experiment(tmp_path / "made").arms[0].runs
    assert (first.last_step, second.last_step) == (300, 2000)
    assert "rtd_auc" in first.columns and "rtd_auc" not in second.columns


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"name": "x", "arms": 3, "measures": [], "scores": {}}'])
def test_what_is_no_experiment_is_refused(broken, tmp_path, capsys):
    (tmp_path / "experiment.json").write_text(broken)
    assert main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'experiment.json'}: " in err and err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_scores_of_fine_tunings(tmp_path, capsys):
    folder = log_folder(tmp_path / "run", records(range(1, 301)))
    task = {"metric": "accuracy", "mean": 0.9, "std": 0.01, "n": 5, "failed": 1}
    for step in (100, 300):
        (folder / f"finetuned/step_{step}").mkdir(parents=True)
        (folder / f"finetuned/step_{step}/results.json").write_text(json.dumps({"model": "m", "tasks": {"sst2": task}}))
    assert main([str(folder), "--output", str(tmp_path / "page.html")]) == 0
    page = Parsed((tmp_path / "page.html").read_text())
    assert page.tables["fine_tuning"][1:] == [
        [f"run: step_{step}", "0.9000 ± 0.0100 (5, 1 failed)"] for step in (100, 300)
    ]
    assert main([str(folder / "finetuned/step_100"), "--output", str(tmp_path / "page.html")]) == 0
