"""Packages that a user may have for other work: which of them are used, and why others are not.

A package is known by what would be imported from it, not by its name: PyPI's `apex`, for one, is not NVIDIA's.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any, NamedTuple

import torch


class OptionalPart(NamedTuple):
    """A package that has something to offer.

    Attributes:
        name: for people.
        module: where the offer is imported from.
        offer: its name there.
        distribution: what the package is called when it is installed.
        remark: why the offer is not taken; None where it is, on GPUs.
    """

    name: str
    module: str
    offer: str
    distribution: str
    remark: str | None = None


FLASH_ATTN = OptionalPart("flash-attn", "flash_attn", "flash_attn_varlen_func", "flash-attn")
_ADAM = "torch's fused AdamW does in as few kernels what its FusedAdam does"
PARTS = (
    FLASH_ATTN,
    OptionalPart(
        "Transformer Engine", "transformer_engine.pytorch.optimizers", "FusedAdam", "transformer-engine", _ADAM
    ),
    OptionalPart("NVIDIA Apex", "apex.optimizers", "FusedAdam", "apex", _ADAM),
)


def offered(part: OptionalPart) -> Any:
    """Give what `part` offers.

    Raises:
        ImportError: it is not installed, another package has its name, or it was built for another torch.
    """
    try:
        return getattr(importlib.import_module(part.module), part.offer)
    except (AttributeError, OSError, RuntimeError) as error:  # libraries that are not there, or a GPU that is not
        raise ImportError(str(error)) from error


def describe_part(part: OptionalPart, device: torch.device) -> str:
    """Say in a few words whether `part` is there and used on `device`."""
    if importlib.util.find_spec(part.module.partition(".")[0]) is None:
        return f"{part.name} is not installed"
    try:
        version = importlib.metadata.version(part.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    try:
        offered(part)
    except ImportError as error:
        cause = " ".join(str(error).split())
        return f"{part.distribution} {version} is not {part.name}, or broken: no {part.offer} ({cause})"
    if part.remark is not None:
        return f"{part.name} {version} is not needed: {part.remark}"
    return f"{part.name} {version} is used" if device.type == "cuda" else f"{part.name} {version} is for GPUs"


def optional_parts(device: torch.device) -> str:
    """Say it of all of them, for a summary."""
    return "; ".join(describe_part(part, device) for part in PARTS)
