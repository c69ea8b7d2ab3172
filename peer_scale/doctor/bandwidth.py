"""How fast messages are: all-reduce and pairs of ranks, within a node and between nodes."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

KIB, MIB = 2**10, 2**20
SIZES = {"cpu": (KIB, 64 * KIB, MIB, 16 * MIB), "cuda": (KIB, 64 * KIB, MIB, 16 * MIB, 128 * MIB)}
_REPEATS, _WARM_UP = 5, 2


@dataclass(frozen=True)
class Measure:
    """One kind of message of one size; all groups of the kind send at once, and the slowest counts.

    Attributes:
        link: "node" within a node, "network" between nodes.
        message: "all-reduce", or "pair" for one from a rank to another.
        ranks: of a group.
        size: bytes of the tensor.
        seconds: of one message.
        bandwidth: bytes per second that a rank sends: of an all-reduce 2 (n - 1) / n of its tensor, as in a ring.
    """

    link: str
    message: str
    ranks: int
    size: int
    seconds: float
    bandwidth: float


def measure_links(device: torch.device, sizes: Sequence[int] | None = None) -> dict[str, Any]:
    """Time messages between all ranks of the default group; give the planner's figures and all measures.

    Groups within a node are all its ranks. Groups between nodes are the ranks of one number on each node, all at once,
    so that what a rank gets is its share of the node's network.
    """
    local_size = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = dist.get_world_size() // local_size
    sizes = SIZES[device.type] if sizes is None else sizes
    measures = []
    if local_size > 1:
        rows = [[node * local_size + place for place in range(local_size)] for node in range(nodes)]
        measures += _measure("node", rows, device, sizes)
    if nodes > 1:
        rows = [[node * local_size + place for node in range(nodes)] for place in range(local_size)]
        measures += _measure("network", rows, device, sizes)
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else "CPU",
        "backend": "nccl" if is_gpu else "gloo",
        "host": socket.gethostname(),
        "nodes": nodes,
        "ranks_per_node": local_size,
        "intra_bandwidth": _best(measures, "node"),
        "inter_bandwidth": _best(measures, "network"),
        "latency": _latency(measures, "network" if nodes > 1 else "node"),
        "measures": [asdict(measure) for measure in measures],
    }


def _best(measures: Sequence[Measure], link: str) -> float | None:
    found = [one.bandwidth for one in measures if one.link == link and one.message == "all-reduce"]
    return max(found, default=None)


def _latency(measures: Sequence[Measure], link: str) -> float | None:
    return min((one.seconds for one in measures if one.link == link and one.message == "pair"), default=None)


def _measure(link: str, rows: list[list[int]], device: torch.device, sizes: Sequence[int]) -> list[Measure]:
    """Time both kinds of messages in groups that are rows of ranks, each rank in one of them."""
    groups = [dist.new_group(row) for row in rows]  # all ranks make all groups, in one order
    (own,) = (number for number, row in enumerate(rows) if dist.get_rank() in row)
    group, row = groups[own], rows[own]
    place, ranks = row.index(dist.get_rank()), len(row)
    measures = []
    for size in sizes:
        tensor = torch.zeros(size // 4, device=device)
        seconds = _timed(partial(dist.all_reduce, tensor, group=group), device)
        measures.append(Measure(link, "all-reduce", ranks, size, seconds, 2 * (ranks - 1) / ranks * size / seconds))
        seconds = _timed(partial(_to_and_fro, tensor, row, place, group), device) / 2
        measures.append(Measure(link, "pair", 2, size, seconds, size / seconds))
    return measures


def _to_and_fro(tensor: torch.Tensor, row: Sequence[int], place: int, group: dist.ProcessGroup) -> None:
    """Send from each rank of an even place to its neighbour and back; the last of an odd number rests."""
    if place % 2 == 0 and place + 1 < len(row):
        dist.send(tensor, row[place + 1], group=group)
        dist.recv(tensor, row[place + 1], group=group)
    elif place % 2:
        dist.recv(tensor, row[place - 1], group=group)
        dist.send(tensor, row[place - 1], group=group)


def _timed(action: Callable[[], object], device: torch.device) -> float:
    """Give the seconds of one call on the slowest rank, the mean of some after some others."""
    for _ in range(_WARM_UP):
        action()
    _settle(device)
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        action()
    _settle(device)
    seconds = torch.tensor((time.perf_counter() - begin) / _REPEATS, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
