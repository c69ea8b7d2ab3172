"""What a run leaves for those who operate it, over a stop and two starts."""

import gzip
import json
import re
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint_runs import flags_for
from peer_scale.checkpoints.manifest import read_manifest
from peer_scale.settings.config_file import read_config_file
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from peer_scale.training.callbacks.run_summary import prometheus_text
from runs import read_metrics, train_in_pool


@pytest.fixture(scope="module")
def twice_started(tmp_path_factory, text_file, one_rank):
    """Six steps, and again from the second one: what is left, and the seconds that both took."""
    folder = tmp_path_factory.mktemp("operated")
    ds_config = folder / "with_csv.json"
    tables = {"enabled": True, "output_path": str(folder / "csv"), "job_name": "job"}
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "csv_monitor": tables}))
    flags = flags_for(folder, text_file, "log", "--save", folder / "save", "--save-interval", 2, steps=6)
    flags += ["--deepspeed_config", str(ds_config), "--log-interval", "3", "--eval-interval", "3", "--eval-iters", "1"]
    began = time.time()
    one_rank.run(train_in_pool, [*flags, "--profile-steps", "2:3"])
    time.sleep(0.5)
    one_rank.run(train_in_pool, [*flags, "--load", str(folder / "save" / "step_00000002")])
    return folder, time.time() - began


def test_each_start_is_noted(twice_started):
    folder, _ = twice_started
    starts = [json.loads(line) for line in (folder / "log" / "starts.jsonl").read_text().splitlines()]
    assert [(start["start"], start["step"], start["world_size"]) for start in starts] == [(1, 0, 1), (2, 2, 1)]
    (newest, *_) = sorted((folder / "save").glob("step_*"), reverse=True)
    told = read_manifest(newest).sections.provenance.start
    assert told == {key: value for key, value in starts[1].items() if key not in ("start", "step")}


def test_run_yaml_says_what_started_the_run_and_repeats_it(twice_started):
    folder, _ = twice_started
    path = folder / "log" / "run.yaml"
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(comments) == 4 and "torch" in comments[2] and comments[3].startswith("# 1 ranks (1 on ")
    assert read_config_file(path).path == path
    run = resolve(build_parser().parse_args(["--config", str(path)]), 1)
    assert run.output.profile_steps is None and run.training.train_iters == 6


def test_the_parts_of_the_time_are_the_wall_time(twice_started):
    folder, seconds = twice_started
    summary = json.loads((folder / "log" / "summary.json").read_text())
    parts = summary["parts_s"]
    assert summary["wall_s"] == pytest.approx(sum(parts.values()), rel=1e-9)
    assert summary["wall_s"] == pytest.approx(seconds, rel=0.01, abs=0.2)
    assert all(parts[name] > 0 for name in ("start", "load", "train", "validation", "save", "lost"))
    assert 0.5 <= parts["down"] < 1.5
    assert (summary["steps"], summary["restarts"], summary["last"]["step"]) == (6, 1, 6)
    metrics = read_metrics(folder / "log")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert summary["tokens"] == metrics[-1]["tokens"]
    assert summary["goodput"] == parts["train"] / summary["wall_s"]
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / parts["train"])


def test_monitors_have_each_step_once(twice_started):
    folder, _ = twice_started
    events = EventAccumulator(str(folder / "log" / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    rows = (folder / "csv" / "job" / "train_loss.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["step", "1", "2", "3", "4", "5", "6"]


def test_the_profile_is_a_trace_of_the_steps(twice_started):
    folder, _ = twice_started
    (path,) = (folder / "log" / "profiles").iterdir()
    assert path.name == "rank_00000_steps_2-3.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum("aten::" in str(event.get("name")) for event in events) > 100


def test_metrics_for_prometheus(twice_started):
    folder, _ = twice_started
    values = {}
    for line in (folder / "log" / "metrics.prom").read_text().splitlines():
        if not line.startswith("# TYPE peer_scale_"):
            name, labels, value = re.fullmatch(r"([a-z_0-9]+)\{(.*)\} (\S+)", line).groups()
            values[name, labels] = float(value)
    assert values["peer_scale_step", 'model="bert-tiny"'] == 6
    assert values["peer_scale_busy_time_s", 'model="bert-tiny",of="max"'] > 0
    assert values["peer_scale_seconds", 'model="bert-tiny",of="lost"'] > 0
    assert not list((folder / "log").glob("*.tmp"))


def test_numbers_that_prometheus_has_its_own_words_for():
    text = prometheus_text({"loss": float("inf"), "none": None, "a/b": {"-1": 0.5}, "text": "x"}, "m")
    assert text == (
        '# TYPE peer_scale_loss gauge\npeer_scale_loss{model="m"} +Inf\n'
        '# TYPE peer_scale_a_b gauge\npeer_scale_a_b{model="m",of="-1"} 0.5\n'
    )
