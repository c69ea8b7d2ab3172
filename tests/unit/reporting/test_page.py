"""The page: whole, small enough, nothing in it that a browser would run or fetch."""

import json
import math

import numpy as np
import pytest

from peer_scale.commands.report import main
from report_pages import CONFIG, Parsed, check_figures, log_folder, records, values_of

EVIL = "<script>alert('&1')</script>"
MOST_BYTES = 6_000_000


def page_of(tmp_path, *paths, more=()) -> Parsed:
    output = tmp_path / "page.html"
    assert main([*map(str, paths), "--output", str(output), *more]) == 0
    assert output.stat().st_size < MOST_BYTES
    return Parsed(output.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Parsed:
    tmp_path = tmp_path_factory.mktemp("one")
    lines = list(records(range(1, 301)))
    lines[123]["loss"] = 99.0
    starts = [
        {"start": n + 1, "step": step, "unix_time": 1.7e9, "commit": "0123456789abcdef", "dirty": True, "world_size": 2}
        | {"versions": {"torch": "2.9.0", "cuda": None}, "hosts": ["host-a"], "devices": ["some CPU"]}
        for n, step in enumerate((0, 150))
    ]
    parts = {"start": 2.0, "load": 1.0, "train": 70.0, "validation": 3.0, "save": 1.0, "lost": 0.0, "down": 600.0}
    summary = {"parts_s": parts, "goodput": 0.625, "wall_s": 677.0, "peak_memory_bytes": 2**31}
    folder = log_folder(
        tmp_path / "run",
        lines,
        starts_jsonl="".join(json.dumps(start) + "\n" for start in starts),
        summary_json=json.dumps(summary),
    )
    return page_of(tmp_path, folder)


def test_a_run_by_itself(one):
    check_figures(one)
    titles = [figure["title"] for figure in one.data["figures"]]
    assert titles[:3] == ["Loss", "MLM loss", "MLM accuracy"]
    assert {"RTD AUC", "Label shares of the selected positions", "Learning rate", "Gradient norm"} <= set(titles)
    assert "Tokens per second and device" in titles and "Tokens per second" not in titles
    assert not {"Loss scale", "Model FLOPs utilisation"} & set(titles), "one number all the time, or none"
    text = "".join(one.text)
    assert (
        "peer-tiny reached held-out loss" in text
        and "after 300 steps, 150 k tokens, 3.00e11 FLOPs in 1 min 15 s" in text
    )
    assert "62.5%" in text and "2 GiB" in text and "name: peer-tiny" in text
    source = dict(map(tuple, one.tables["provenance"]))
    assert source["commit"] == "0123456789ab with changes"
    assert source["devices"] == "2 × some CPU" and source["versions"] == "torch 2.9.0" and source["hosts"] == "host-a"
    assert source["starts"] == "2" and source["skipped steps"] == "3"
    assert [one.tables["time"][1][0], one.tables["time"][1][-1]] == ["run", "10 min 0 s"]


def test_nothing_is_drawn_across_a_restart(one):
    for role in ("raw", "smooth"):
        steps, values = one.curve("Loss", role)
        (gap,) = np.flatnonzero(np.isnan(values))
        assert steps[gap - 1] <= 150 < steps[gap + 1]
    assert one.curve("Loss", "restart")[0].tolist() == [151]
    assert one.curve("Loss", "skipped")[0].tolist() == [100, 200, 300]


def test_what_is_drawn_is_what_was_measured(one):
    lines = {line["step"]: line for line in records(range(1, 301))}
    steps, values = one.curve("Loss", "raw")
    assert values[np.flatnonzero(steps == 124)[0]] == 99.0, "the spike is kept"
    for axis, factor in (("tokens", 500), ("train_flops", 1e9), ("time_s", 0.25)):
        assert one.curve("Loss", "raw", axis)[0] == pytest.approx(factor * steps)
    steps, values = one.curve("RTD AUC", "raw")
    assert values[np.isfinite(values)] == pytest.approx(
        [lines[step]["rtd_auc"] for step in steps[np.isfinite(values)]], rel=1e-6
    )
    assert not np.isin(steps, np.arange(7, 301, 7)).any(), "no value, no point"
    assert one.curve("Loss", "held out")[0].tolist() == [50, 100, 150, 150, 200, 250, 300]
    assert one.curve("Loss", "smooth")[1][-1] == pytest.approx(5.2, abs=0.2)


def test_label_shares_are_stacked_to_the_whole(one):
    areas = one.figure("Label shares of the selected positions")["data"]
    assert [trace["name"] for trace in areas] == ["level 1", "level 2", "level unknown"]
    assert all(trace["stackgroup"] for trace in areas)
    assert sum(values_of(trace["y"]) for trace in areas) == pytest.approx(1, abs=1e-5)


def test_runs_side_by_side(tmp_path):
    for arm, levels, level in (("three", 3, 5.0), ("two", 2, 4.0)):
        for seed in (1, 2, 3):
            config = {**CONFIG, "objective": {"kind": "tqr", "num_levels": levels}, "seed": seed}
            steps = range(1, 101 if (arm, seed) == ("three", 3) else 301)
            log_folder(tmp_path / "runs" / arm / f"s{seed}", records(steps, seed=seed, level=level), config)
    page = page_of(tmp_path, tmp_path / "runs", more=["--title", "Levels"])
    check_figures(page)
    results = {row[0]: row[1:] for row in page.tables["results"]}
    assert results[""] == ["peer-tiny num_levels 3", "peer-tiny num_levels 2"]
    assert results["runs"] == ["3, 1 not finished", "3"]
    last = [np.mean([line["mlm_loss"] for line in records(range(1, 301), seed=s)][-6:]) for s in (1, 2)]
    assert results["MLM loss"][0] == f"{np.mean(last):.3f} ± {np.std(last, ddof=1):.3f}"
    assert page.tables["differences"] == [["setting", *results[""]], ["objective.num_levels", "3", "2"]]
    roles = [trace["meta"]["role"] for trace in page.figure("MLM loss")["data"]]
    assert roles == [*["seed"] * 3, "mean"] * 2
    bold = [trace for trace in page.figure("MLM loss")["data"] if trace["meta"]["role"] == "mean"]
    assert len({trace["line"]["color"] for trace in bold}) == len({trace["line"]["dash"] for trace in bold}) == 2
    assert values_of(bold[1]["y"])[-1] == pytest.approx(4 + math.exp(-3), abs=0.1)


def test_whatever_files_say_is_text(tmp_path):
    lines = [
        {**line, f"{EVIL}_accuracy": line["loss"], "rank_label_fractions": {EVIL: 1 - step % 2, "1": step % 2}}
        for step, line in enumerate(records(range(1, 60)))
    ]
    config = {**CONFIG, "name": EVIL, "training": {"lr": EVIL}}
    folder = log_folder(tmp_path / "a<b>&'c\"", lines, config)
    other = log_folder(tmp_path / "other", lines, {**config, "name": f"{EVIL}2"})
    page = page_of(tmp_path, folder, other, more=["--title", EVIL])
    check_figures(page)
    assert [kind for kind, _ in page.scripts] == ["application/json", None, None], "no other script has come in"
    assert not page.handlers
    assert page.data["arms"] == [EVIL, f"{EVIL}2"]
    assert "".join(page.text).count(EVIL) >= 3
    names = {trace.get("name", "") for figure in page.data["figures"] for trace in figure["data"]}
    assert not any("<" in name for name in names), "plotly reads a little HTML in names"


def test_no_address_leads_out_of_the_page(one):
    assert set(one.addresses) == {"data:,"}


def test_many_long_runs_stay_small(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        noise = rng.normal(size=(1200, 12))
        lines = [
            {"step": step + 1, "tokens": 512 * step, "train_flops": 1e9 * step, "step_time_s": 0.1}
            | {f"metric_{name}": value for name, value in enumerate(row)}
            for step, row in enumerate(noise.round(6).tolist())
        ]
        log_folder(tmp_path / "runs" / str(number), lines, {"name": f"arm {number}"})
    check_figures(page_of(tmp_path, tmp_path / "runs"))


@pytest.mark.parametrize("lines", [[], [{"step": 1}], [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]])
def test_runs_that_have_hardly_begun(lines, tmp_path):
    page = page_of(tmp_path, log_folder(tmp_path / "run", lines))
    assert len(page.data["figures"]) == (len(lines) == 2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["gone"], "gone: no such folder"),
        (["."], "holds no metrics.jsonl, no experiment.json and no results.json"),
        ([], "RUN"),
        (["run", "--output", "no/such/page.html"], "--output no/such/page.html: cannot be written"),
    ],
)
def test_refusals(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "run" in argv:
        log_folder(tmp_path / "run", records(range(1, 4)))
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
