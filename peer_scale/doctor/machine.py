"""Checks of the set-up: what is installed, and what the machine gives a rank."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from packaging.requirements import Requirement

import peer_scale
from peer_scale.doctor.outcome import Failed, NotTried, Outcome, attempt
from peer_scale.errors import UserError
from peer_scale.parallel.environment import detect_environment
from peer_scale.parallel.meeting import no_address, port_taken
from peer_scale.training.start_checks import SHARED_MEMORY, shared_memory_shortage, size

DISTRIBUTION = "peer-scale"
NO_GPU = "no GPU"
_LIBRARIES = ("torch", "deepspeed", "megatron-core", "transformers", "triton")
_NEEDED = ("torch", "deepspeed", "megatron-core", "transformers")
_MIB, _GIB = 2**20, 2**30
_DEFAULT_PORT = 29500  # of torchrun and of deepspeed
_FILES_OF_A_RANK = 1024
_NETWORK_DISKS = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "afs",
    "9p",
    "fuse.sshfs",
    "wekafs",
}


def check_setup(
    environ: Mapping[str, str],
    *,
    num_ranks: int,
    num_gpus: int,
    folder: Path = Path("."),
    shared_memory: Path = SHARED_MEMORY,
) -> list[Outcome]:
    """Run all checks of this node.

    Args:
        environ: this process's environment variables.
        num_ranks: that will run on this node.
        num_gpus: that torch sees.
        folder: where checkpoints are to go.
        shared_memory: where the system keeps memory that processes share.
    """
    checks: dict[str, Callable[[], str]] = {
        "versions": check_versions,
        "one package": lambda: check_one_package(installed_packages(), Path(peer_scale.__file__).parent),
        "devices": lambda: check_devices(num_gpus, driver_gpus()),
        "NCCL": lambda: check_nccl(num_gpus),
        "shared memory": lambda: check_shared_memory(shared_memory, num_ranks=num_ranks, has_gpus=num_gpus > 0),
        "disk": lambda: check_disk(folder),
        "temporary files": lambda: check_temporary_files(Path(tempfile.gettempdir()), file_systems()),
        "address": lambda: check_address(socket.gethostname(), environ.get("MASTER_ADDR")),
        "port": lambda: check_port(environ),
        "open files": check_open_files,
        "compiler": lambda: check_compiler(environ, has_gpus=num_gpus > 0),
    }
    return [attempt("setup", name, check) for name, check in checks.items()]


def versions() -> dict[str, str]:
    """Give the versions of Python and the libraries; those that are not installed are left out."""
    found = {"python": platform.python_version(), DISTRIBUTION: peer_scale.__version__}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_versions() -> str:
    """Compare what is installed with what the package asks for."""
    found = versions()
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise Failed(f"not installed: {', '.join(missing)}; pip install {DISTRIBUTION} installs what is needed")
    wrong = unmet(_requirements(), found)
    if wrong:
        raise Failed(f"{'; '.join(wrong)}: pip install --upgrade {DISTRIBUTION} installs what is needed")
    return ", ".join(f"{name} {version}" for name, version in found.items())


def unmet(requirements: Iterable[str], found: Mapping[str, str]) -> list[str]:
    """Name the libraries in `found` whose version is not one that `requirements` ask for, as in "torch>=2.7"."""
    wrong = []
    for requirement in map(Requirement, requirements):
        version = found.get(requirement.name)
        is_asked_for = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if version is not None and is_asked_for and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    return wrong


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return []


def installed_packages(path: list[str] | None = None) -> dict[Path, str]:
    """Find all installed versions of this package: the folder of each, and its version.

    An editable installation says where its checkout is, which need not be on the path itself.
    """
    found = {}
    for distribution in importlib.metadata.distributions(name=DISTRIBUTION, path=sys.path if path is None else path):
        direct = json.loads(distribution.read_text("direct_url.json") or "{}")
        if direct.get("dir_info", {}).get("editable"):
            folder = Path(urllib.parse.unquote(urllib.parse.urlparse(direct["url"]).path)) / peer_scale.__name__
        else:
            folder = Path(str(distribution.locate_file(peer_scale.__name__)))
        if folder.is_dir():
            found[folder.resolve()] = distribution.version
    return found


def check_one_package(installed: Mapping[Path, str], running: Path) -> str:
    """Find out whether the package that runs is the one that is installed: ranks may come to import another."""
    running = running.resolve()
    others = [f"{folder} ({version})" for folder, version in installed.items() if folder != running]
    if others:
        raise Failed(
            f"two versions of the package: running is {running} ({peer_scale.__version__}), installed is "
            f"{', '.join(others)}; pip uninstall {DISTRIBUTION}, or pip install -e of the checkout that runs"
        )
    version = installed.get(running, peer_scale.__version__)
    if version != peer_scale.__version__:
        raise Failed(
            f"{running} is version {peer_scale.__version__} and was installed as {version}: pip install it once more"
        )
    return f"{running}{'' if installed else ', which is not installed'}"


def driver_gpus() -> list[str]:
    """Give the driver's version and the name of each GPU that it knows, as nvidia-smi tells; nothing without it."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []


def check_devices(num_gpus: int, known_to_driver: list[str]) -> str:
    """Compare the GPUs that torch sees with those that the driver knows."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if num_gpus:
        names = [torch.cuda.get_device_name(index) for index in range(num_gpus)]
        driver = f", driver {known_to_driver[0].split(',')[0]}" if known_to_driver else ""
        cuda = torch.version.cuda or torch.version.hip
        counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        return f"{counted}{driver}, torch for CUDA {cuda}"
    if known_to_driver and visible is None:
        raise Failed(
            f"the driver knows {len(known_to_driver)} GPUs ({known_to_driver[0]}), but torch {torch.__version__} sees "
            "none: install a torch build for CUDA that the driver is new enough for"
        )
    hidden = f" (CUDA_VISIBLE_DEVICES is {visible!r})" if known_to_driver else ""
    raise NotTried(NO_GPU + hidden)


def check_nccl(num_gpus: int) -> str:
    """Give the version of the NCCL that torch was built with."""
    import torch

    if not num_gpus:
        raise NotTried(NO_GPU)
    if not torch.distributed.is_nccl_available():
        raise Failed(f"torch {torch.__version__} has no NCCL, which ranks on GPUs talk over: install another build")
    return ".".join(map(str, torch.cuda.nccl.version()))


def check_shared_memory(folder: Path, *, num_ranks: int, has_gpus: bool) -> str:
    """Find out whether loader workers, and NCCL within a node, have the memory that they share."""
    shortage = shared_memory_shortage(folder, num_ranks=num_ranks, has_gpus=has_gpus)
    if shortage is not None:
        raise Failed(shortage)
    disk = shutil.disk_usage(folder)
    with _named_if_it_fails(folder), tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, _MIB)
    return f"{folder}: {size(disk.free)} free of {size(disk.total)}"


def check_disk(folder: Path) -> str:
    """Write, sync and rename a file as checkpoints are written, and see how much space there is."""
    with _named_if_it_fails(folder):
        folder = folder.resolve()
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as inner:
            written = Path(inner) / "written"
            with written.open("wb") as file:
                file.write(bytes(_MIB))
                file.flush()
                os.fsync(file.fileno())
            written.replace(written.with_name("renamed"))
            if written.with_name("renamed").stat().st_size != _MIB:
                raise Failed(f"{folder}: a file that was written, synced and renamed is not as long as it was written")
        seconds = time.perf_counter() - begin
        free = shutil.disk_usage(folder).free
    if free < _GIB:
        raise Failed(f"{folder} has {size(free)} free, a checkpoint takes 12 bytes per parameter: give --folder DIR")
    return f"{folder}: {size(free)} free, 1 MiB written, synced and renamed in {seconds * 1e3:.0f} ms"


def check_temporary_files(folder: Path, mounted: Mapping[Path, str]) -> str:
    """Find out whether temporary files stay on the node: compilers' caches on a network disk race and are slow.

    Args:
        folder: for temporary files.
        mounted: the kind of file system at each place where one is mounted.
    """
    around = [folder.resolve(), *folder.resolve().parents]
    kind = next((mounted[place] for place in around if place in mounted), "unknown")
    if kind in _NETWORK_DISKS:
        raise Failed(f"{folder} is on a network disk ({kind}): set TMPDIR to a folder of the node's own")
    with _named_if_it_fails(folder), tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    return f"{folder} ({kind}), {size(shutil.disk_usage(folder).free)} free"


def file_systems() -> dict[Path, str]:
    """Give the kind of file system at each place where one is mounted."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {Path(fields[1]): fields[2] for line in lines if len(fields := line.split()) > 2}


def check_address(host: str, master: str | None) -> str:
    """Find out whether this host's name, and MASTER_ADDR where it is set, have addresses."""
    found = []
    for name, what in ((host, "this host's name"), (master, "MASTER_ADDR")):
        if name:
            try:
                found.append(f"{name} is {socket.getaddrinfo(name, None)[0][4][0]}")
            except OSError as error:
                raise Failed(no_address(what, name, error)) from None
    return ", ".join(found)


def check_port(environ: Mapping[str, str]) -> str:
    """Find out whether the port at which ranks will meet is free on this host."""
    try:
        environment = detect_environment(environ)
    except UserError as error:
        raise Failed(str(error)) from None
    if environment.launcher != "none":
        raise NotTried(f"the ranks of {environment.launcher} have met already")
    port = environment.master_port or _DEFAULT_PORT
    name = "MASTER_PORT" if environment.master_port else "the launchers' default port"
    with socket.socket() as probe:
        # as the store of the ranks does it: what only waits for late packets is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise Failed(port_taken(name, port, str(error.strerror))) from None
    return f"{name} {port} is free"


def check_open_files() -> str:
    """Compare the limit of open files with what a rank needs for its sockets and shared tensors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES_OF_A_RANK:
        raise Failed(f"a process may have {soft} files open, a rank wants {_FILES_OF_A_RANK}: ulimit -n 65536")
    return f"{_limit(soft)} per process (at most {_limit(hard)})"


def check_compiler(environ: Mapping[str, str], *, has_gpus: bool) -> str:
    """Find the compilers that Triton and DeepSpeed's optimizer on the host call."""
    compilers = [environ.get("CC") or "cc", environ.get("CXX") or "c++"]
    missing = [name for name in compilers if shutil.which(name.split()[0]) is None]
    if missing and has_gpus:
        raise Failed(f"no {' and no '.join(missing)}: Triton's kernels need a C compiler, optimizer offload a C++ one")
    if missing:
        raise NotTried(f"no {' and no '.join(missing)}; on CPUs only optimizer offload and torch.compile need them")
    return ", ".join(str(shutil.which(name.split()[0])) for name in compilers)


@contextlib.contextmanager
def _named_if_it_fails(folder: Path) -> Iterator[None]:
    """Raise what the disk raises in the block as `Failed`, with the folder's name."""
    try:
        yield
    except OSError as error:
        raise Failed(f"{folder}: cannot be written: {error.strerror}") from None


def _limit(value: int) -> str:
    return "no limit" if value == resource.RLIM_INFINITY else f"{value:,}"
