"""What hangs onto the training loop, by itself: the terminal, metrics on disk, ends that come early."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from peer_scale.checkpoints.progress import Progress
from peer_scale.errors import StoppedEarly, UserError
from peer_scale.parallel.topology import single_process_topology
from peer_scale.settings.run import OutputConfig
from peer_scale.training.callbacks.closing import ClosingSummary
from peer_scale.training.callbacks.console import ProgressLine, describe, duration
from peer_scale.training.callbacks.reporting import MetricsFile, MonitorEvents, going_on_with
from peer_scale.training.callbacks.stopping import StopAfter, StopOnInterrupt, StopOnSignal, StopSignals
from peer_scale.training.metering import Meter, StepRecord
from peer_scale.training.trainer import Trainer
from small_runs import small_run


def trainer_of(run, callbacks=()):
    """A loop whose engine is never asked for anything."""
    topology = single_process_topology()
    meter = Meter(run, 1, None)
    return Trainer(run, topology, None, None, None, meter, callbacks, progress=Progress(), warmup_steps=0)


def metrics_of(step, **changes):
    metrics = {"step": step, "loss": 12.5, "mlm_loss": 7.25, "tqr_loss": 0.105, "lr": 1e-3, "step_time_s": 2.0}
    metrics |= {"mlm_accuracy": 0.125, "rtd_auc": None, "rank_concordance": 0.5, "rtd_recall": 0.25}
    metrics |= {"tokens_per_second": 12345.6, "tflops_per_device": 0.0456, "mfu": 0.321, "mws_accuracy": 0.75}
    return metrics | changes


def test_lines_without_a_terminal(capsys):
    run = small_run(train_iters=20, output=OutputConfig(log_interval=5))
    line = ProgressLine(run, 0, {4: "it rises here"})
    for step in range(1, 21):
        line.on_metrics(metrics_of(step, **({"validation_loss": 11.25} if step == 15 else {})))
    line.on_train_end(trainer_of(run))
    out = capsys.readouterr().out.splitlines()
    assert [text.split("  ")[0] for text in out] == [
        *("step 1/20", "step 4: it rises here", "step 5/20", "step 10/20", "step 15/20"),
        *("step 15: validation loss 11.2500", "step 20/20"),
    ]
    assert out[2].endswith("ETA 0:00:30"), "15 more steps of 2 seconds"
    assert out[-1].endswith("ETA 0:00:00")


def test_a_resumed_runs_lines(capsys):
    run = small_run(train_iters=4000, output=OutputConfig(log_interval=100))
    line = ProgressLine(run, 2000, {})
    line.on_metrics(metrics_of(2001))
    line.on_metrics(metrics_of(2002))
    (only,) = capsys.readouterr().out.splitlines()
    assert only.startswith("step 2001/4000  loss 12.5000")
    assert only.endswith("ETA 1:06:38"), "of the steps of this run alone"


def test_a_terminal_gets_one_line_that_stays(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    run = small_run(train_iters=20)
    master, slave = os.openpty()
    with ThreadPoolExecutor(1) as reader:
        shown = reader.submit(all_of, master)
        with open(slave, "w") as terminal, contextlib.redirect_stdout(terminal):
            line = ProgressLine(run, 3, {5: "it rises here"})
            for step in (4, 5):
                line.on_metrics(metrics_of(step))
            line.on_train_end(trainer_of(run))
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.result(timeout=60))
    os.close(master)
    *above, last = text.replace("\r\n", "\n").strip().split("\n")
    assert "step 5: it rises here" in "".join(above)
    assert "\r" in "".join(above), "written over in place"
    last = last.split("\r")[-1]
    assert " 5/20 " in last and "loss 12.5000  (mlm 7.2500, tqr 0.1050)  MLM accuracy 0.125" in last
    assert not re.search(r"step \d+/20", text), "no line per step"


def all_of(descriptor):
    """What comes from a terminal until nobody writes to it any more, which Linux calls an error."""
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(descriptor, 4096):
            parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("bert-tiny", "loss 12.5000  MLM accuracy 0.125  lr 1.00e-03  12,346 tokens/s  0.0456 TFLOP/s  MFU 32.1%"),
        ("teams-tiny", "loss 12.5000  (mlm 7.2500, rtd 0.5000, mws 1.2500)  MLM accuracy 0.125  MWS accuracy 0.750  "),
    ],
)
def test_one_steps_text(preset, expected):
    objective = small_run(preset).objective
    text = describe(metrics_of(1, rtd_loss=0.5, mws_loss=1.25), objective)
    assert text.startswith(expected)
    assert "MFU" not in describe(metrics_of(1, rtd_loss=0.5, mws_loss=1.25, mfu=None), objective)


def test_durations():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 360_000)] == ["0:00:00", "0:01:00", "0:59:59", "100:00:00"]


def test_the_closing_summary_has_the_last_and_the_best(capsys, tmp_path):
    run = small_run(train_iters=20, output=OutputConfig(save=tmp_path / "saved", log_dir=tmp_path / "logs"))
    summary, trainer = ClosingSummary(run, 16), trainer_of(run)
    summary.on_train_end(trainer)
    assert capsys.readouterr().out == "", "nothing was trained"
    for step, loss, accuracy in ((17, 9.0, 0.5), (18, 7.0, 0.25), (19, 8.0, None)):
        validated = {"validation_loss": 10.0 - step % 2} if step > 17 else {}
        counts = {"samples": 6 * step, "tokens": 100 * step, "train_flops": 1e9 * step}
        summary.on_metrics(metrics_of(step, loss=loss, mlm_accuracy=accuracy, **counts, **validated))
    trainer.progress = Progress(19, 114, 1900)
    summary.on_train_end(trainer)
    out = dict(re.split(" {2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert out["run"].startswith("stopped after step 19 of 20; 3 in this run, 0:00:")
    assert out["seen"].startswith("114 sequences, 1,900 tokens (fill 52.1%); 1.9e+10 FLOPs")
    assert out["last"].startswith("loss 8.0000, ") and "MLM accuracy" not in out["last"]
    assert "loss 7.0000 (step 18), MLM accuracy 0.5000 (step 17)" in out["best"]
    assert "validation loss 9.0000 (step 19)" in out["best"]
    assert str(tmp_path / "saved") in out["checkpoint"] and str(tmp_path / "logs") in out["logs"]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_fresh_metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2):
        file.on_metrics({"step": step, "loss": 1.5, "shares": {"1": 0.5, "2": math.nan}, "grad_norm": math.inf})
        assert len(lines_of(path)) == step, "flushed at once"
    assert lines_of(path)[1] == {"step": 2, "loss": 1.5, "shares": {"1": 0.5, "2": None}, "grad_norm": None}


def test_a_resumed_run_leaves_no_gap_and_repeats_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    written = "".join(json.dumps({"step": step, "run": "first"}) + "\n" for step in range(1, 8))
    path.write_text(written + '{"step": 8, "ru')  # killed while it wrote
    file = MetricsFile(path, 5)
    file.on_metrics({"step": 6, "run": "second"})
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3, 4, 5, 6]
    assert [line["run"] for line in lines_of(path)] == ["first"] * 5 + ["second"]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("tail", ["", "\n", "7\n", '"text"\n', '{"loss": 1}\n{"step": 3}\n', '{"step": 3, "loss": 0.'])
def test_what_is_no_line_of_metrics_is_dropped_with_all_after_it(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    MetricsFile(path, 9)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_is_taken_out_of_the_file_is_kept_beside_it(tmp_path):
    path, dropped = tmp_path / "metrics.jsonl", tmp_path / "metrics.dropped.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    MetricsFile(path, 1)
    assert (path.read_text(), dropped.read_text()) == ('{"step": 1}\n', '{"step": 2}\n{"st\n')
    MetricsFile(path, 0)
    assert (path.read_text(), dropped.read_text()) == ("", '{"step": 2}\n{"st\n{"step": 1}\n')


def _fill_disk(ballast, is_full):
    if not is_full:
        ballast.unlink()
        return
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.fixture
def small_disk(mount_disk):
    """Mount a disk of 16 pages; gives its folder and what fills it up or makes room."""
    folder = mount_disk("64k")
    return folder, lambda is_full: _fill_disk(folder / "ballast", is_full)


def test_a_full_disk_delays_lines_and_loses_none(small_disk, capsys):
    folder, fill = small_disk
    path = folder / "logs/metrics.jsonl"
    file = MetricsFile(path, 0)
    lines = [{"step": step, "text": "x" * 700} for step in range(1, 41)]
    for line in lines[:3]:
        file.on_metrics(line)
    fill(True)
    for line in lines[3:20]:
        file.on_metrics(line)
    assert path.read_bytes().endswith(b"}\n"), "no part of a line"
    assert lines_of(path) == lines[: len(lines_of(path))] and len(lines_of(path)) < 20
    fill(False)
    for line in lines[20:]:
        file.on_metrics(line)
    assert lines_of(path) == lines
    assert capsys.readouterr().err == (
        f"warning: {path}: cannot be written (No space left on device); training goes on, "
        "1 lines are kept until it can be\n"
    )


def test_a_disk_that_is_full_to_the_end_costs_the_last_lines_and_says_so(small_disk, capsys):
    folder, fill = small_disk
    path = folder / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.on_metrics({"step": 1})
    fill(True)
    for step in range(2, 9):
        file.on_metrics({"step": step, "text": "x" * 700})
    file.on_train_end(trainer_of(small_run()))
    assert lines_of(path)[0] == {"step": 1}
    lost = 8 - len(lines_of(path))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"warning: {path}: cannot be written (No space left on device); the last {lost} lines are lost"
    )


def test_a_folder_that_vanishes_is_made_anew(tmp_path, capsys):
    path = tmp_path / "logs/metrics.jsonl"
    file = MetricsFile(path, 0)
    file.on_metrics({"step": 1})
    shutil.rmtree(path.parent)
    file.on_metrics({"step": 2})
    assert lines_of(path) == [{"step": 2}]
    shutil.rmtree(path.parent)
    path.parent.write_text("a file now")
    file.on_metrics({"step": 3})
    path.parent.unlink()
    file.on_metrics({"step": 4})
    assert lines_of(path) == [{"step": 3}, {"step": 4}]
    assert capsys.readouterr().err.count("cannot be written") == 1


def write_events(log_dir, blocks, lines, fill=None):
    """In a rank: DeepSpeed's monitors ask which one they are in."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, which takes a minute
    deepspeed.init_distributed("gloo", verbose=False)
    monitor = MonitorEvents(log_dir, blocks, retry_after=0)
    for line in lines:
        if line["step"] in (fill or {}):
            _fill_disk(log_dir / "ballast", fill[line["step"]])
        monitor.on_metrics(line)


def test_events_of_tensorboard_and_of_what_the_ds_config_enables(tmp_path, one_rank):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    blocks = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}}
    lines = [{"step": step, "loss": 2.0 / step, "mfu": None, "shares": {"1": 0.5, "2": None}} for step in (1, 2)]
    one_rank.run(write_events, tmp_path / "logs", blocks, lines)
    accumulator = EventAccumulator(str(tmp_path / "logs/tensorboard")).Reload()
    assert set(accumulator.Tags()["scalars"]) == {"train/loss", "train/shares/1"}
    assert [(event.step, event.value) for event in accumulator.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    (table,) = (tmp_path / "csv").rglob("*loss.csv")
    assert [row.split(",")[0] for row in table.read_text().splitlines()[1:]] == ["1", "2"]


def test_a_monitor_on_a_full_disk_gets_later_what_it_could_not_take(small_disk, one_rank):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = small_disk
    lines = [{"step": step, **{f"number_{n}": float(step) for n in range(40)}} for step in range(1, 9)]
    one_rank.run(write_events, folder, {}, lines, {3: True, 6: False})
    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {event.step for event in accumulator.Scalars("train/number_7")} == set(range(1, 9))


def test_services_on_the_net_go_on_with_the_run_they_know():
    blocks = {"wandb": {"enabled": True}, "comet": {"enabled": True, "project": "p"}, "csv_monitor": {"enabled": True}}
    environ = {}
    found = going_on_with("20260101-000000-abcd", blocks, environ)
    assert environ == {"WANDB_RUN_ID": "20260101-000000-abcd", "WANDB_RESUME": "allow"}
    key = found["comet"].pop("experiment_key")
    assert re.fullmatch("[0-9a-f]{40}", key) and found == {**blocks, "comet": {"enabled": True, "project": "p"}}
    again = going_on_with("20260101-000000-abcd", blocks, environ)
    assert again["comet"]["experiment_key"] == key
    assert going_on_with("another", blocks, {})["comet"]["experiment_key"] != key
    chosen = {"WANDB_RUN_ID": "mine"}
    own = going_on_with("run", {**blocks, "comet": {"enabled": True, "experiment_key": "mine"}}, chosen)
    assert chosen["WANDB_RUN_ID"] == "mine" and own["comet"]["experiment_key"] == "mine"
    plain: dict[str, str] = {}
    assert going_on_with("run", {"wandb": {"enabled": False}}, plain) == {"wandb": {"enabled": False}} and not plain


def test_no_monitor_writes_nothing(tmp_path, one_rank):
    one_rank.run(write_events, None, {"train_batch_size": 4}, [{"step": 1, "loss": 2.0}])
    assert not list(tmp_path.iterdir())


def test_a_monitor_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="the ds_config's monitor cannot be started") as error:
        MonitorEvents(tmp_path, {"csv_monitor": {"enabled": "perhaps"}})
    assert "perhaps" in str(error.value)


def record(step):
    return StepRecord(step, torch.zeros(0), 0.1, None, 1.0, 0)


def test_stop_after_some_minutes():
    trainer = trainer_of(small_run())
    StopAfter(60).on_step_end(trainer, record(1))
    assert not trainer.wants_stop
    StopAfter(0).on_step_end(trainer, record(2))
    assert trainer.wants_stop
    StopAfter(60).on_step_end(trainer, record(3))
    assert trainer.wants_stop, "no callback takes back what another asked for"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_on_a_signal(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        with pytest.raises(StoppedEarly, match=f"{number.name} before the first step"):
            os.kill(os.getpid(), number)
        signals.received = None
        trainer, stop = trainer_of(small_run()), StopOnSignal(signals)
        stop.on_step_end(trainer, record(1))
        assert not trainer.wants_stop
        os.kill(os.getpid(), number)
        stop.on_step_end(trainer, record(2))
        assert trainer.wants_stop
    assert signal.getsignal(number) == before
    with StopSignals(active=False):
        assert signal.getsignal(number) == before


@pytest.mark.parametrize("save", [None, Path("runs/x")])
def test_ctrl_c_stops_after_the_step_and_is_told_when_all_is_saved(save):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer, stop = trainer_of(small_run()), StopOnInterrupt(save)
        stop.on_step_end(trainer, record(1))
        assert not trainer.wants_stop
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # passed on by the launcher
        os.kill(os.getpid(), signal.SIGTERM)  # sent by the launcher
        stop.on_step_end(trainer, record(2))
        assert trainer.wants_stop
        kept = "saved in runs/x" if save else "nothing was saved, for want of --save"
        with pytest.raises(KeyboardInterrupt, match=f"interrupted after step 0: {kept}"):
            stop.on_train_end(trainer)
        assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_that_nobody_interrupts_ends_as_always():
    StopOnInterrupt(None).on_train_end(trainer_of(small_run()))
