"""A rank's own log file."""

import contextlib
import logging
import re
import warnings

import pytest

from peer_scale.errors import UserError
from peer_scale.quiet import silence_libraries
from peer_scale.training.complaints import complain
from peer_scale.training.rank_log import rank_log


def test_warnings_and_what_ends_the_block(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's would show them too
    silence_libraries()
    with pytest.raises(ZeroDivisionError), rank_log(tmp_path / "ranks", 3):
        complain("a disk is slow")
        logging.getLogger("DeepSpeed").warning("hidden from the terminal")
        logging.getLogger("DeepSpeed").info("not worth it")
        logging.getLogger("somebody.else").warning("of %s", "another library")
        assert 1 / 0
    complain("too late")
    text = (tmp_path / "ranks" / "rank_00003.log").read_text()
    lines = re.findall(r"^\d{4}-\d\d-\d\d [\d:,]+ \S+ rank 3 (\w+) (\S+): (.*)$", text, re.MULTILINE)
    assert lines == [
        ("WARNING", "peer_scale", "a disk is slow"),
        ("WARNING", "DeepSpeed", "hidden from the terminal"),
        ("WARNING", "somebody.else", "of another library"),
        ("ERROR", "peer_scale", "Traceback (most recent call last):"),
    ]
    assert text.rstrip().endswith("ZeroDivisionError: division by zero")
    shown = capsys.readouterr().err
    assert shown.count("a disk is slow") == 1 and "hidden" not in shown and "of another library" in shown


def test_bad_input_is_one_line(tmp_path):
    with contextlib.suppress(UserError), rank_log(tmp_path, 0):
        raise UserError("--lr is too much")
    assert (tmp_path / "rank_00000.log").read_text().endswith("rank 0 ERROR peer_scale: --lr is too much\n")


def test_where_no_file_can_be_the_block_runs(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", None):
        with rank_log(folder, 0), warnings.catch_warnings():
            complain("said all the same")
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk_ends_nothing(mount_disk):
    folder = mount_disk("64k")
    with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(UserError, match="as it is"), rank_log(folder / "ranks", 0):
        complain("said all the same")
        raise UserError("as it is")
