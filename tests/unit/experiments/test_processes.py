"""Programs of an experiment: they end with it, and their failures are told in a line."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from peer_scale.checkpoints.manifest import MANIFEST
from peer_scale.experiments.curves import look_up, read_curve
from peer_scale.experiments.plan import make_plan
from peer_scale.experiments.pretraining import RunFolder, pretrain
from peer_scale.experiments.processes import ProgramError, Programs, last_line
from peer_scale.experiments.reading import read_experiment
from runs import PROJECT

PARENT = """
import sys
from pathlib import Path
from peer_scale.experiments.processes import Programs
Programs(one_thread=True).run(["sh", "-c", f"echo $$ > {sys.argv[1]}; exec sleep 60"], Path(sys.argv[1] + ".log"))
"""


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_program_ends_with_the_experiment_even_when_that_is_killed(tmp_path):
    marker = tmp_path / "pid"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(marker)], env=environment)
    process = int(wait_for(lambda: marker.exists() and marker.read_text().strip()))
    assert is_alive(process)
    parent.kill()
    parent.wait()
    wait_for(lambda: not is_alive(process))


def test_all_programs_are_stopped_and_none_started_afterwards(tmp_path):
    programs, codes = Programs(one_thread=False), []
    threads = [
        threading.Thread(target=lambda: codes.append(programs.run(["sleep", "60"], tmp_path / "log"))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(programs._running) == 2)
    programs.stop()
    for thread in threads:
        thread.join(20)
    assert codes == [-signal.SIGTERM] * 2
    assert programs.run(["touch", tmp_path / "late"], tmp_path / "log") == -signal.SIGTERM
    assert not (tmp_path / "late").exists()


def test_a_failure_is_told_by_the_last_line(tmp_path):
    log = tmp_path / "log"
    with pytest.raises(ProgramError, match=r"exit code 2: error: no such thing \(all of it: .*log\)"):
        Programs(one_thread=True).check(["sh", "-c", "echo first; echo error: no such thing >&2; exit 2"], log)
    assert log.read_text() == "first\nerror: no such thing\n"
    (tmp_path / "silent").touch()
    assert last_line(tmp_path / "silent") == "it said nothing"


def test_programs_side_by_side_have_one_thread_each(tmp_path):
    Programs(one_thread=True).check(["sh", "-c", "echo $OMP_NUM_THREADS"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "1\n"


@pytest.fixture
def arm(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("{name: x, arms: [{name: bert, model: bert-tiny, steps: 3}]}")
    return make_plan(read_experiment(path), path, None).arms["bert"]


def trainer(tmp_path, ends):
    """A program in the trainer's place: at each start it saves some steps and ends with a code, as `ends` says."""
    script = tmp_path / "trainer.sh"
    lines = [f"{number}) save {step}; exit {code};;" for number, (step, code) in enumerate(ends, 1)]
    folder = '"$save/step_0000000$1"'
    save = f"save() {{ [ $1 = 0 ] || {{ mkdir -p {folder}; touch {folder}/{MANIFEST}; }}; }}"
    script.write_text(
        "\n".join(
            [
                "#!/bin/sh",
                f"echo start >> {tmp_path}/starts",
                'while [ $# -gt 0 ]; do [ "$1" = --save ] && save=$2; shift; done',
                save,
                f"case $(wc -l < {tmp_path}/starts) in",
                *lines,
                "esac",
            ]
        )
    )
    return ["sh", str(script)], lambda: len((tmp_path / "starts").read_text().splitlines())


def test_a_run_that_was_stopped_is_started_again_until_it_is_done(tmp_path, arm):
    launcher, starts = trainer(tmp_path, [(1, 75), (2, 75), (3, 0)])
    folder = RunFolder(tmp_path / "run")
    pretrain(folder, arm, 1, Programs(one_thread=True), launcher)
    assert (starts(), folder.saved_step) == (3, 3)
    pretrain(folder, arm, 1, Programs(one_thread=True), launcher)
    assert starts() == 3, "what is done is not started again"


@pytest.mark.parametrize(("ends", "code", "starts"), [([(1, 2)], 2, 1), ([(1, 75), (0, 75), (0, 75), (0, 75)], 75, 4)])
def test_a_run_that_fails_or_gets_nowhere_is_given_up(tmp_path, arm, ends, code, starts):
    launcher, count = trainer(tmp_path, ends)
    with pytest.raises(ProgramError, match=f"exit code {code}: it said nothing"):
        pretrain(RunFolder(tmp_path / "run"), arm, 1, Programs(one_thread=True), launcher)
    assert count() == starts


def test_a_curve_has_at_most_200_points_and_loses_no_total(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = []
    for step in range(1, 1001):
        validation = f', "validation_mlm_loss": {1000 - step}' if step % 100 == 0 else ""
        lines.append(
            f'{{"step": {step}, "tokens": {10 * step}, "train_flops": {7.0 * step}, "step_time_s": 0.5, '
            f'"tflops_per_device": 2e-9, "mfu": null, "loss": {step % 5}, "rank_label_fractions": {{"-1": 0.25}}'
            f"{validation}}}"
        )
    metrics.write_text("\n".join(lines) + "\n")
    curve = read_curve(metrics, num_devices=3)
    assert (curve.steps, curve.tokens, curve.flops_paper, curve.wall_s) == (1000, 10_000, 7000.0, 500.0)
    assert curve.flops_actual == 1000 * 2000 * 0.5 * 3
    assert len(curve.points) == 200
    assert [point["step"] for point in curve.points] == list(range(5, 1001, 5))
    assert {point["loss"] for point in curve.points} == {2.0}  # of five steps each
    assert curve.points[-1]["time_s"] == 500.0
    assert curve.points[19]["validation_mlm_loss"] == 900
    assert "validation_mlm_loss" not in curve.points[0]
    assert curve.points[0]["mfu"] is None
    assert look_up(curve.last, "rank_label_fractions/-1") == 0.25
    assert look_up(curve.last, "rank_label_fractions/9") is None
    assert look_up(curve.last, "validation_rtd_auc") is None
