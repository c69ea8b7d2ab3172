"""Checks of the set-up, on set-ups that are broken for real."""

import os
import resource
import socket
import sys
from pathlib import Path

import pytest

from peer_scale import __version__
from peer_scale.doctor import machine
from peer_scale.doctor.outcome import Failed, NotTried, attempt

MIB = 2**20


@pytest.fixture
def no_launcher(monkeypatch):
    """The environment of a process that no launcher has started."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return os.environ


def failure(check, *args, **options) -> str:
    """The one line of a check that fails."""
    with pytest.raises(Failed) as failed:
        check(*args, **options)
    line = str(failed.value)
    assert "\n" not in line
    return line


def install(site: Path, version: str, *, editable: Path | None = None) -> Path:
    """Put into a folder what pip leaves there; gives the package's folder."""
    record = site / f"peer_scale-{version}.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: peer-scale\nVersion: {version}\n")
    package = (editable or site) / "peer_scale"
    package.mkdir(parents=True, exist_ok=True)
    if editable:
        (record / "direct_url.json").write_text(f'{{"url": "{editable.as_uri()}", "dir_info": {{"editable": true}}}}')
    return package


def test_what_is_installed_here_is_told_and_good_enough():
    line = machine.check_versions()
    assert f"python {sys.version.split()[0]}" in line
    assert f"peer-scale {__version__}" in line
    for name in ("torch", "deepspeed", "megatron-core", "transformers"):
        assert f"{name} " in line


def test_a_version_that_is_too_old_or_too_new_is_named():
    asked = ["torch>=2.7,<2.14", "deepspeed>=0.19.8", 'triton>=3.3; extra == "test"', "rich>=13.0"]
    found = {"torch": "2.13.0+cpu", "deepspeed": "0.16.2", "triton": "3.0"}
    assert machine.unmet(asked, found) == ["deepspeed is 0.16.2, needed is >=0.19.8"]
    assert machine.unmet(asked, {"torch": "2.14.1"}) == ["torch is 2.14.1, needed is <2.14,>=2.7"]


def test_two_versions_of_the_package_are_one_line(tmp_path):
    running = tmp_path / "checkout" / "peer_scale"
    running.mkdir(parents=True)
    wheel = install(tmp_path / "site", "0.0.9")
    installed = machine.installed_packages([str(tmp_path / "site")])
    assert installed == {wheel: "0.0.9"}
    line = failure(machine.check_one_package, installed, running)
    assert line.startswith("two versions of the package: ")
    assert f"{running} ({__version__})" in line
    assert f"{wheel} (0.0.9)" in line


def test_an_editable_installation_is_where_its_checkout_is(tmp_path):
    with_blank = tmp_path / "a checkout"
    checkout = install(tmp_path / "site", __version__, editable=with_blank)
    installed = machine.installed_packages([str(tmp_path / "site")])
    assert installed == {checkout: __version__}
    assert machine.check_one_package(installed, checkout) == str(checkout)
    assert "not installed" in machine.check_one_package({}, checkout)


def test_an_installation_of_another_version_of_this_checkout_is_a_failure(tmp_path):
    checkout = install(tmp_path / "site", "0.0.1", editable=tmp_path / "checkout")
    installed = machine.installed_packages([str(tmp_path / "site")])
    assert "was installed as 0.0.1" in failure(machine.check_one_package, installed, checkout)


def test_gpus_that_the_driver_knows_and_torch_does_not_are_a_failure(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    line = failure(machine.check_devices, 0, ["550.54.15, NVIDIA H100 80GB HBM3"] * 8)
    assert "the driver knows 8 GPUs" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(NotTried, match="CUDA_VISIBLE_DEVICES is ''"):
        machine.check_devices(0, ["550.54.15, NVIDIA H100 80GB HBM3"])
    with pytest.raises(NotTried, match=r"^no GPU$"):
        machine.check_devices(0, [])


def test_shared_memory_of_a_megabyte_is_one_line(mount_disk):
    disk = mount_disk("1m")
    line = failure(machine.check_shared_memory, disk, num_ranks=2, has_gpus=False)
    assert line.startswith(f"{disk} has 1.0 MiB free of 1.0 MiB, 2 ranks want 128.0 MiB: ")
    assert "--shm-size" in line


def test_shared_memory_that_suffices_passes(mount_disk):
    disk = mount_disk("300m")
    assert "free of 300.0 MiB" in machine.check_shared_memory(disk, num_ranks=2, has_gpus=False)
    assert not any(disk.iterdir())
    assert "2 ranks want 1.0 GiB" in failure(machine.check_shared_memory, disk, num_ranks=2, has_gpus=True)


def test_shared_memory_that_is_not_there_is_one_line(tmp_path):
    assert "is not there" in failure(machine.check_shared_memory, tmp_path / "shm", num_ranks=1, has_gpus=False)


def test_a_full_disk_is_one_line(mount_disk):
    disk = mount_disk("64k")
    assert failure(machine.check_disk, disk) == f"{disk}: cannot be written: No space left on device"


def test_a_small_disk_is_one_line(mount_disk):
    disk = mount_disk("8m")
    assert f"{disk} has 8.0 MiB free" in failure(machine.check_disk, disk)
    assert not any(disk.iterdir())


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    assert failure(machine.check_disk, tmp_path / "gone").endswith("cannot be written: No such file or directory")


def test_temporary_files_on_a_network_disk_are_a_failure(tmp_path):
    inner = tmp_path / "user" / "tmp"
    inner.mkdir(parents=True)
    mounted = {Path("/"): "ext4", tmp_path: "nfs4"}
    assert f"{inner} is on a network disk (nfs4)" in failure(machine.check_temporary_files, inner, mounted)
    assert "(tmpfs)" in machine.check_temporary_files(inner, {**mounted, inner: "tmpfs"})


def test_file_systems_are_read_from_the_kernel(mount_disk):
    disk = mount_disk("1m")
    assert machine.file_systems()[disk] == "tmpfs"


def test_a_name_without_an_address_is_one_line():
    assert "this host's name no-such-host.invalid has no address" in failure(
        machine.check_address, "no-such-host.invalid", None
    )
    assert "MASTER_ADDR no-such-host.invalid" in failure(machine.check_address, "localhost", "no-such-host.invalid")
    assert "localhost is " in machine.check_address("localhost", None)


def test_a_port_in_use_is_one_line(no_launcher):
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        port = listening.getsockname()[1]
        line = failure(machine.check_port, {**no_launcher, "MASTER_PORT": str(port)})
        assert line.startswith(f"MASTER_PORT {port} cannot be had (Address already in use): ")
    assert machine.check_port({**no_launcher, "MASTER_PORT": str(port)}) == f"MASTER_PORT {port} is free"


def test_the_port_is_a_launchers_where_it_has_started_this_process():
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(NotTried, match="environment have met"):
        machine.check_port({**ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    assert "MASTER_PORT is 'x'" in failure(machine.check_port, {"MASTER_PORT": "x"})


def test_a_low_limit_of_open_files_is_one_line():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
    try:
        assert "1000 files open" in failure(machine.check_open_files)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        assert machine.check_open_files().startswith("1,024 per process")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_compilers_are_found_or_missed(tmp_path):
    missing = {"CC": str(tmp_path / "cc"), "CXX": "sh"}
    assert f"no {tmp_path}/cc: Triton" in failure(machine.check_compiler, missing, has_gpus=True)
    with pytest.raises(NotTried, match="optimizer offload"):
        machine.check_compiler(missing, has_gpus=False)
    assert machine.check_compiler({"CC": "sh -x", "CXX": "sh"}, has_gpus=True).count("/sh") == 2


def test_whatever_a_check_raises_is_one_line():
    def broken():
        raise OSError("first line\nsecond line")

    outcome = attempt("setup", "disk", broken)
    assert (outcome.state, outcome.line) == ("failed", "OSError: first line second line")
