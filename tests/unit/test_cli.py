"""The command `peer-scale` and the doors to the same commands in a checkout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from peer_scale import __version__
from peer_scale.cli import COMMANDS, main
from peer_scale.errors import UserError
from peer_scale.settings.ds_config import read_ds_config

PROJECT = Path(__file__).resolve().parents[2]
DOORS = {
    "peer_scale/pretrain.py": "train",
    "tools/preprocess_data.py": "data",
    "tools/plan.py": "plan",
    "tools/convert_checkpoint.py": "convert",
    "tools/doctor.py": "doctor",
    "tools/report.py": "report",
}


def test_help_is_there_before_anything_heavy_is_imported():
    script = (
        "import sys; from peer_scale.cli import main; code = main(['--help']); "
        "print(code, {'numpy', 'pydantic', 'tokenizers', 'torch', 'transformers', 'yaml'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.endswith("0 set()\n")
    for name, command in COMMANDS.items():
        assert re.search(f"  {name} +{re.escape(command.summary)}\n", done.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_is_called_and_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: peer-scale {name} ")
    assert "example" in text or name == "convert"  # whose subcommands have them


@pytest.mark.parametrize(
    ("argv", "said"), [(["trian"], "did you mean train?"), ([], "is missing"), (["x"], "known: train")]
)
def test_what_is_no_command_is_refused_in_one_line(argv, said, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"peer-scale {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train", "--seq-lenght", "64"], "--seq-lenght"),
        (["data", "--input", "builtin"], "--output-prefix is missing"),
        (["convert", "verify", "--load", "gone"], "gone"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_gives_its_exit_code(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert said in captured.err


@pytest.mark.parametrize("door", DOORS)
def test_doors_open_their_own_checkout_whatever_is_installed(door, tmp_path):
    (tmp_path / "peer_scale").mkdir()
    (tmp_path / "peer_scale/__init__.py").write_text("raise ImportError('another peer_scale is installed here')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, PROJECT / door, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert COMMANDS[DOORS[door]].module in (PROJECT / door).read_text()


@pytest.mark.parametrize("said", ["zero2", "zero2.json", "ds_configs/zero2.json"])
def test_shipped_ds_configs_are_found_from_any_folder(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(Path(said)) == json.loads((PROJECT / "ds_configs/zero2.json").read_text())


def test_every_ds_config_is_shipped():
    shipped = {path.name: path.read_text() for path in (PROJECT / "peer_scale/ds_configs").iterdir()}
    assert shipped == {path.name: path.read_text() for path in (PROJECT / "ds_configs").iterdir()}
    assert "zero2.json" in shipped


def test_a_file_that_is_there_wins_over_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 3}}')
    assert read_ds_config(Path("zero2.json")) == {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("said", ["zero4", "own/zero2.json", "ds_configs/zero4.json"])
def test_other_missing_files_are_an_error_that_names_the_shipped_ones(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{said}: no such file; shipped are zero1, zero2, .*zero3_offload"):
        read_ds_config(Path(said))
