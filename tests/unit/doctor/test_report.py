"""The table, the file, and what several nodes have found."""

import io
import json
import os
import pty

import pytest

from peer_scale.doctor.outcome import Outcome, join_nodes
from peer_scale.doctor.report import allowed_environment, print_table, write_report
from peer_scale.errors import UserError

OUTCOMES = [
    Outcome("setup", "disk", "passed", "1 GiB free"),
    Outcome("gpu", "attention's kernels", "not tried", "no GPU"),
    Outcome("curves", "TP 2", "failed", "step 3: loss is 2 instead of 1", {"found": [2]}),
]


def test_the_table_is_plain_where_nobody_looks_at_a_terminal():
    file = io.StringIO()
    print_table(OUTCOMES, file)
    assert file.getvalue().splitlines() == [
        "setup   disk                 passed     1 GiB free",
        "gpu     attention's kernels  not tried  no GPU",
        "curves  TP 2                 failed     step 3: loss is 2 instead of 1",
        "1 passed, 1 failed, 1 not tried",
    ]


def test_the_table_is_drawn_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        print_table(OUTCOMES, terminal)
        terminal.flush()
        drawn = os.read(ours, 10_000).decode()
    os.close(ours)
    assert "\x1b[" in drawn
    for outcome in OUTCOMES:
        assert outcome.name in drawn
        assert outcome.line in drawn


def test_the_report_has_what_was_found_and_no_secrets(tmp_path):
    path = tmp_path / "doctor.json"
    environ = {"HF_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret", "MASTER_PORT": "29500", "NCCL_DEBUG": "INFO"}
    write_report(path, OUTCOMES, bandwidth={"latency": 1e-5}, environ=environ, arguments=["--only", "setup"])
    text = path.read_text()
    assert "s3cret" not in text
    assert [one.name for one in tmp_path.iterdir()] == ["doctor.json"]
    report = json.loads(text)
    assert report["environment"] == {"MASTER_PORT": "29500", "NCCL_DEBUG": "INFO"}
    assert report["checks"][2] == {
        "group": "curves",
        "name": "TP 2",
        "state": "failed",
        "line": "step 3: loss is 2 instead of 1",
        "details": {"found": [2]},
    }
    assert report["bandwidth"] == {"latency": 1e-5}
    assert "torch" in report["versions"]


def test_names_that_sound_of_secrets_are_not_allowed():
    from peer_scale.doctor.report import _ALLOWED

    assert allowed_environment({"PATH": "/bin", "HOME": "/home/x", "USER": "x"}) == {}
    assert not [name for name in _ALLOWED for part in ("KEY", "TOKEN", "SECRET", "PASS") if part in name]


def test_a_report_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--report .*: cannot be written: No such file"):
        write_report(tmp_path / "gone" / "doctor.json", OUTCOMES, bandwidth=None, environ={}, arguments=[])


def rows(state, line="fine", name="disk"):
    return [Outcome("setup", name, state, line)]


def test_one_node_is_not_named():
    assert join_nodes([("a", OUTCOMES)]) == OUTCOMES


def test_the_node_that_fails_is_named():
    (joined,) = join_nodes([("a", rows("passed")), ("b", rows("failed", "full")), ("c", rows("not tried", "-"))])
    assert (joined.state, joined.line) == ("failed", "b: full")
    assert joined.details == {"a": "fine", "b": "full", "c": "-"}
    nodes = [(f"n{number}", rows("failed", "full")) for number in range(6)] + [("m", rows("passed"))]
    assert join_nodes(nodes)[0].line == "n0, n1, n2, n3 and 2 more: full"


def test_nodes_that_agree_are_counted():
    (joined,) = join_nodes([("a", rows("passed")), ("b", rows("passed"))])
    assert (joined.state, joined.line) == ("passed", "all 2 nodes: fine")


def test_nodes_of_other_versions_are_a_failure():
    (joined,) = join_nodes(
        [("a", rows("passed", "torch 2.8", "versions")), ("b", rows("passed", "torch 2.9", "versions"))]
    )
    assert (joined.state, joined.line) == ("failed", "nodes differ: a has torch 2.8; b has torch 2.9")
