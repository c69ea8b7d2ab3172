"""What started a run: versions and commit, compared between ranks and kept."""

import json
import socket
import subprocess
import sys

import psutil
import pytest
import torch

from peer_scale.parallel.coordination import RankCoordinator
from peer_scale.training.provenance import (
    append_start,
    describe_start,
    device_name,
    difference_of_software,
    find_software,
    process_began,
    versions,
)

SAME = {"torch": "2.9", "peer_scale": "0.5", "git commit": None}


def git(folder, *words):
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path):
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "module.py").write_text("1\n")
    git(package.parent, "init", "-q")
    empty = find_software(package)
    assert empty.commit is None and "git commit" not in empty.compared(), "nothing is committed yet"
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "first")
    head = git(package.parent, "rev-parse", "HEAD").strip()
    assert (find_software(package).commit, find_software(package).dirty) == (head, False)
    (package / "notes.txt").write_text("not in git")
    assert find_software(package).dirty is False
    (package / "module.py").write_text("2\n")
    assert find_software(package).dirty is True
    installed = package.parent / "environment" / "site-packages" / "package"
    installed.mkdir(parents=True)
    found = find_software(installed)
    assert (found.commit, found.dirty, found.is_installed) == (None, None, True)
    assert found.compared()["git commit"] is None and "driver" not in found.compared()


def test_versions_are_those_that_run():
    found = versions()
    assert found["torch"] == torch.__version__ and found["python"] == sys.version.split()[0]
    assert found["cuda"] == torch.version.cuda
    assert all(found[name] for name in ("deepspeed", "megatron-core", "transformers", "peer_scale"))


def test_ranks_that_run_the_same_differ_in_nothing():
    assert difference_of_software([("a", SAME)] * 3 + [("b", SAME)]) is None
    without_git = {name: version for name, version in SAME.items() if name != "git commit"}
    assert difference_of_software([("a", without_git), ("b", SAME | {"git commit": "abc"})]) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"torch": "2.8"}, "torch is 2.8 on b and 2.9 elsewhere"),
        ({"git commit": "abc"}, "git commit is abc on b and not there elsewhere"),
        ({"torch": None, "peer_scale": "0.4"}, "torch is not there on b and 2.9 elsewhere; peer_scale is 0.4 on b"),
    ],
)
def test_the_host_with_another_version_is_named(change, told):
    line = difference_of_software([("a", SAME), ("b", SAME | change), ("b", SAME | change), ("c", SAME), ("a", SAME)])
    assert line is not None and told in line
    assert "compared are torch, peer_scale, git commit" in line


def start_with_another_torch(rank_with_it):
    import torch.distributed as dist

    from peer_scale.errors import UserError

    plain = torch.__version__
    if dist.get_rank() == rank_with_it:
        torch.__version__ = "1.0"
    try:
        return describe_start(RankCoordinator(), torch.device("cpu"), unix_time=1.0).as_json()
    except UserError as error:
        return str(error)
    finally:
        torch.__version__ = plain


def test_all_ranks_are_refused_alike(two_ranks):
    lines = two_ranks.run(start_with_another_torch, 1)
    assert lines[0] == lines[1] and "torch is 1.0 on" in lines[0]
    first, second = two_ranks.run(start_with_another_torch, None)
    assert first == second and first["world_size"] == 2 and first["hosts"] == [socket.gethostname()]
    assert first["devices"] == [device_name(torch.device("cpu"))] and first["slurm"] is None


def test_starts_are_numbered_lines(tmp_path, one_rank):
    path = tmp_path / "starts.jsonl"
    environ = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}
    one_rank.run(write_starts, path, environ)
    lines = [json.loads(line) for line in path.read_text().splitlines() if line != '{"cut']
    assert [(line["start"], line["step"]) for line in lines] == [(1, 0), (2, 7)]
    assert lines[1]["slurm"] == {"job_id": "77", "restart_count": 2}
    assert lines[0].keys() >= {"unix_time", "command", "commit", "dirty", "versions", "hosts", "devices"}


def write_starts(path, environ):
    start = describe_start(RankCoordinator(), torch.device("cpu"), environ, unix_time=5.5)
    append_start(path, start, 0)
    with path.open("a") as file:
        file.write('{"cut')  # by a kill
    append_start(path, start, 7)


def test_when_this_process_began():
    assert process_began() == pytest.approx(psutil.Process().create_time(), abs=1.5), (
        "Linux tells the time of its boot in seconds"
    )
