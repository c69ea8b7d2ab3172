"""The processes of a data-parallel fine-tuning, as launchers start them; without a launcher there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other ranks, if a launcher has started any."""
    if world_size() > 1:
        PartialState(cpu=not torch.cuda.is_available())


def of_first_rank(make: Callable[[], T]) -> T:
    """Give every rank what the first one makes."""
    if not dist.is_initialized():
        return make()
    made: list = [make() if is_first_rank() else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]
