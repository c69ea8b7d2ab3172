"""Which GPU is this rank's, how it computes, and where compilers keep what they make for it."""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from peer_scale.errors import UserError
from peer_scale.parallel.environment import ProcessEnvironment

_SAME_VIEW_FOR_ALL = ("torchrun", "deepspeed")
_CACHES = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
}


@dataclass(frozen=True)
class Place:
    """What a rank tells the others of the device that it will take.

    Attributes:
        host: its node's name.
        gpu: what no other GPU anywhere is called; None on the CPU, "" for a GPU that has no such name.
        error: why it cannot take one.
    """

    host: str
    gpu: str | None
    error: str | None = None


def choose_gpu(*, local_rank: int, local_world_size: int, num_visible: int, launcher: str) -> int:
    """Give the number of this rank's GPU among those that its process sees.

    A process sees all GPUs of its node, each rank taking one, or fewer than there are ranks because something gave it
    GPUs of its own (`--gpus-per-task`, `--gpu-bind`, a pod, a script that sets CUDA_VISIBLE_DEVICES). Whether they are
    its own can only be told by comparing ranks: see `contradiction`.

    Args:
        local_rank: this rank's number on its node.
        local_world_size: ranks on this node.
        num_visible: GPUs that this process sees, at least 1.
        launcher: as in `ProcessEnvironment`.

    Raises:
        UserError: the launcher shows all ranks the same GPUs, and there are fewer than ranks.
    """
    if num_visible >= local_world_size:
        return local_rank
    if num_visible > 1 and launcher in _SAME_VIEW_FOR_ALL:
        raise UserError(
            f"{launcher} started {local_world_size} ranks on this node, which shows them {num_visible} GPUs: start "
            f"{num_visible} at most"
        )
    return local_rank % num_visible


def contradiction(places: Sequence[Place]) -> str | None:
    """Say what is wrong with the devices that the ranks will take, `places` being in their order; None if nothing is.

    Nodes may differ in their number of GPUs, as long as each rank has one of its own or none has any.
    """
    for rank, place in enumerate(places):
        if place.error is not None:
            return place.error if len(places) == 1 else f"rank {rank} on {place.host}: {place.error}"
    seen: dict[str, int] = {}
    for rank, place in enumerate(places):
        if (place.gpu is None) != (places[0].gpu is None):
            without, with_ = (rank, 0) if place.gpu is None else (0, rank)
            return (
                f"rank {without} on {places[without].host} sees no GPU, but rank {with_} on {places[with_].host} does: "
                'let all ranks see one, or hide them from all (CUDA_VISIBLE_DEVICES="")'
            )
        if place.gpu:
            first = seen.setdefault(place.gpu, rank)
            if first != rank:
                return f"ranks {first} and {rank} on {place.host} see no GPU but one and the same: start a rank per GPU"
    return None


def take_device(environment: ProcessEnvironment, store: dist.Store | None) -> torch.device:
    """Give this rank's device, the CPU where no rank sees a GPU, and make it the current one.

    Args:
        environment: which rank this is.
        store: where all ranks meet; None for a rank that is alone.

    Raises:
        UserError: on all ranks alike: a rank has no GPU of its own while others have.
    """
    device, place = torch.device("cpu"), Place(socket.gethostname(), None)
    if torch.cuda.is_available():
        try:
            number = choose_gpu(
                local_rank=environment.local_rank,
                local_world_size=environment.local_world_size,
                num_visible=torch.cuda.device_count(),
                launcher=environment.launcher,
            )
            device = torch.device("cuda", number)
            place = Place(place.host, _name_of(number))
        except UserError as error:
            place = Place(place.host, "", str(error))
    places = [place]
    if store is not None:
        places = exchange_places(store, environment.rank, environment.world_size, place)
    wrong = contradiction(places)
    if wrong is not None:
        raise UserError(wrong)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        compute_exactly()
        keep_caches_on_this_node(os.environ)
    return device


def keep_caches_on_this_node(environ: MutableMapping[str, str], folder: Path | None = None) -> None:
    """Let compilers keep their results in a folder of this node and user, where they are not told another.

    By default they lie in the home folder: where nodes share it, ranks of several nodes write the same files at once.
    Nothing is changed where a folder that is this user's alone cannot be had.

    Args:
        environ: the process's environment variables; those of Triton, inductor and torch's extensions are added.
        folder: where to make it, else the folder for temporary files ($TMPDIR).
    """
    own = (folder or Path(tempfile.gettempdir())) / f"peer_scale_{os.getuid()}"
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        found = own.lstat()
    except OSError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        return
    for variable, name in _CACHES.items():
        environ.setdefault(variable, str(own / name))


def compute_exactly() -> None:
    """Keep fp32 products in fp32 and sums of bf16 and fp16 products in fp32, whatever an image's defaults are.

    The head picks tokens by comparing logits, of which some are computed twice by products of different shapes: sums
    rounded on the way would make them differ.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _name_of(number: int) -> str:
    """Name a GPU as no other is called; "" for a slice of one (MIG), whose name may be that of the whole."""
    properties = torch.cuda.get_device_properties(number)
    return "" if "MIG" in properties.name else str(getattr(properties, "uuid", ""))


def exchange_places(store: dist.Store, rank: int, world_size: int, place: Place) -> list[Place]:
    """Give the places of all ranks; on rank 0, in whose process the store is, once all others have them too."""
    store, ranks = dist.PrefixStore("places", store), range(world_size)
    store.set(f"of/{rank}", json.dumps(asdict(place)))
    places = [Place(**json.loads(text)) for text in store.multi_get([f"of/{other}" for other in ranks])]
    store.set(f"read/{rank}", "")
    if rank == 0:
        store.wait([f"read/{other}" for other in ranks])
    return places
