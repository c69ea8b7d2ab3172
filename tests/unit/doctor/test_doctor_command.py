"""The command as a user starts it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peer_scale.commands import plan
from peer_scale.commands.doctor import main

PROJECT = Path(__file__).resolve().parents[3]
# a checkout may be tried beside an installation of another; the machine's ports are everybody's
OF_THIS_MACHINE = {"one package", "port"}


@pytest.fixture
def setup(tmp_path, capsys, monkeypatch):
    """Run the checks of the set-up; gives the exit code, and the report's checks by their names."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags):
        report = tmp_path / "doctor.json"
        code = main(["--only", "setup", "--report", str(report), "--folder", str(tmp_path), *map(str, flags)])
        captured = capsys.readouterr()
        checks = {one["name"]: one for one in json.loads(report.read_text())["checks"]}
        for name, check in checks.items():
            assert f"setup: {name}: {check['state']}\n" in captured.err
            (line,) = [line for line in captured.out.splitlines() if line.startswith("setup") and f"  {name}  " in line]
            assert line.endswith(check["line"])
        assert f"report: {report}" in captured.out
        assert code == any(check["state"] == "failed" for check in checks.values())
        return code, checks

    return run


def test_the_set_up_is_looked_at_in_no_time(setup):
    begin = time.monotonic()
    _, checks = setup()
    assert time.monotonic() - begin < 30
    failed = {name for name, check in checks.items() if check["state"] == "failed"}
    assert failed <= OF_THIS_MACHINE, [checks[name]["line"] for name in failed]
    assert len(checks) == 11


def test_broken_set_ups_are_a_line_each(setup, mount_disk, monkeypatch):
    disk = mount_disk("1m")
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        port = listening.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        code, checks = setup("--shared-memory", disk)
    assert code == 1
    assert checks["shared memory"]["line"].startswith(f"{disk} has 1.0 MiB free of 1.0 MiB")
    assert checks["port"]["line"].startswith(f"MASTER_PORT {port} cannot be had (Address already in use)")


def test_a_wheel_of_another_version_beside_the_checkout_is_a_line(setup, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "peer_scale").mkdir(parents=True)
    (site / "peer_scale-0.0.9.dist-info").mkdir()
    (site / "peer_scale-0.0.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: peer-scale\nVersion: 0.0.9\n"
    )
    monkeypatch.syspath_prepend(str(site))
    code, checks = setup()
    assert code == 1
    line = checks["one package"]["line"]
    assert line.startswith(f"two versions of the package: running is {PROJECT / 'peer_scale'} (")
    assert f"{site / 'peer_scale'} (0.0.9)" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "everything"], "--only"),
        (["--ranks", "0"], "--ranks"),
        (["--steps", "x"], "--steps"),
        (["--report", "/proc/doctor.json"], "--report /proc: cannot be written"),
    ],
)
def test_bad_input_is_one_line(flags, said, capsys):
    assert main(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_a_launcher_says_how_many_ranks_there_are(capsys, monkeypatch):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--ranks", "4"]) == 2
    assert "--ranks 4 has no effect" in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_part_for_cpus_passes_and_the_planner_takes_its_figures(tmp_path, capsys):
    report = tmp_path / "doctor.json"
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    command = [sys.executable, str(PROJECT / "tools/doctor.py"), "--report", str(report)]
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=590, check=False)
    assert report.exists(), done.stderr
    assert time.monotonic() - begin < 300
    found = json.loads(report.read_text())
    states = {f"{one['group']}: {one['name']}": one for one in found["checks"] if one["name"] not in OF_THIS_MACHINE}
    assert {one["line"] for one in states.values() if one["state"] == "failed"} == set()
    passed = [name for name, one in states.items() if one["state"] == "passed"]
    for name in (
        "one process on the CPU",
        "DP 2, ZeRO-1",
        "DP 2, ZeRO-2",
        "DP 2, ZeRO-3",
        "TP 2",
        "TP 2 with SP",
        "PP 2",
    ):
        assert f"curves: {name}" in passed
    assert "bandwidth: messages between ranks" in passed
    assert [one["state"] for one in states.values() if one["group"] == "gpu"] == ["not tried"] * 5
    flags = ["--model", "peer-tiny", "--nodes", "1", "--gpus-per-node", "2", "--micro-batch-size", "2", "--measured"]
    assert plan.main([*flags, str(report)]) == 0
    figure = found["bandwidth"]["intra_bandwidth"] / 1e9
    assert f"{figure:,.0f} GB/s per GPU within a node" in capsys.readouterr().out


@pytest.mark.slow
def test_a_launcher_may_start_the_doctor(tmp_path):
    report = tmp_path / "doctor.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "peer_scale.cli"]
    flags = ["doctor", "--only", "bandwidth", "--report", str(report)]
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environ["PYTHONPATH"] = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environ,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [one["state"] for one in json.loads(report.read_text())["checks"]] == ["passed"]
    assert done.stdout.count("1 passed, 0 failed, 0 not tried") == 1
