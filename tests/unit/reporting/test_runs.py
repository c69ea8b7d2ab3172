"""What is read of a run's files, whole or broken."""

import json

import numpy as np
import pytest

from peer_scale.errors import UserError
from peer_scale.reporting.arms import arms_of, differences
from peer_scale.reporting.build import read_runs
from peer_scale.reporting.runs import read_run
from report_pages import CONFIG, log_folder, records


def test_the_last_record_of_a_step_that_was_done_again_wins(tmp_path):
    before, after = records(range(1, 101), seed=1), list(records(range(61, 91), seed=2))
    run = read_run(log_folder(tmp_path / "run", [*before, *after]), "run")
    assert run.steps.tolist() == list(range(1, 91)), "91 to 100 were taken back with the restart"
    assert run.restarts == (60,)
    assert run.columns["loss"][60:].tolist() == [line["loss"] for line in after]
    assert [(part.start, part.stop) for part in run.segments()] == [(0, 60), (60, 90)]


def test_starts_are_restarts_where_steps_follow(tmp_path):
    starts = "".join(
        json.dumps({"start": n, "step": step, "world_size": 4}) + "\n" for n, step in enumerate((0, 40, 90))
    )
    run = read_run(log_folder(tmp_path / "run", records(range(1, 91)), starts_jsonl=starts), "run")
    assert run.restarts == (40,)
    assert run.world_size == 4


def test_lines_that_are_no_records_are_counted_and_left_out(tmp_path):
    folder = log_folder(tmp_path / "run", records(range(1, 4)))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"loss": 2}\n{"step": 4, "loss": NaN, "odd": "text", "mfu": 1e999}\n\n{"step": 5, "lo')
    run = read_run(folder, "run")
    assert run.unread == 3
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert np.isnan(run.columns["loss"][3])
    assert "odd" not in run.columns and "mfu" not in run.columns


def test_steps_that_were_skipped(tmp_path):
    lines = list(records(range(1, 301)))
    assert read_run(log_folder(tmp_path / "counted", lines), "run").skipped.tolist() == [100, 200, 300]
    for line in lines:
        del line["skipped_steps"]
        line["grad_norm"] = None if line["step"] == 7 else line["grad_norm"]
    assert read_run(log_folder(tmp_path / "not_counted", lines), "run").skipped.tolist() == [7]


def test_seeds_are_one_arm_and_other_settings_another(tmp_path):
    for name, change in (("a/s1", {}), ("a/s2", {"seed": 2}), ("b", {"objective": {"kind": "tqr", "num_levels": 2}})):
        log_folder(tmp_path / name, records(range(1, 4)), {**CONFIG, **change})
    arms = arms_of(read_runs([tmp_path, tmp_path / "b"]))
    assert [(arm.label, [run.name for run in arm.runs]) for arm in arms] == [
        ("peer-tiny num_levels 3", ["a/s1", "a/s2"]),
        ("peer-tiny num_levels 2", ["b"]),
    ]
    assert [(each.key, each.values) for each in differences(arms)] == [("objective.num_levels", ("3", "2"))]


def test_what_a_run_has_set_aside_is_passed_over(tmp_path):
    log_folder(tmp_path / "run", records(range(1, 3)))
    log_folder(tmp_path / "other" / "earlier_1", records(range(1, 3)))
    assert [run.name for run in read_runs([tmp_path])] == ["run"]
    with pytest.raises(UserError, match=r"other: holds no metrics\.jsonl"):
        read_runs([tmp_path / "other"])
