"""What `peer-scale doctor` has measured of a cluster, in place of the planner's own figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peer_scale.errors import UserError
from peer_scale.planning.layout import Cluster

SECTION = "bandwidth"
_FIGURES = ("intra_bandwidth", "inter_bandwidth", "latency")


@dataclass(frozen=True)
class Measured:
    """Figures of a cluster; None where there was nothing to measure, such as between nodes on one node.

    Attributes:
        intra_bandwidth: bytes/s per rank in one direction, within a node.
        inter_bandwidth: likewise, between nodes.
        latency: seconds per message.
    """

    intra_bandwidth: float | None = None
    inter_bandwidth: float | None = None
    latency: float | None = None

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Read the doctor's report; UserError where it is none, or has no figures."""
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"--measured {path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UserError(f"--measured {path}: is no JSON; the report of peer-scale doctor is wanted") from None
        section: Any = report.get(SECTION) if isinstance(report, dict) else None
        if not isinstance(section, dict):
            raise UserError(f"--measured {path}: has no {SECTION}; peer-scale doctor --only bandwidth measures it")
        figures = {name: section.get(name) for name in _FIGURES}
        for name, value in figures.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < float("inf")):
                raise UserError(f"--measured {path}: {SECTION}.{name} is {value!r}; it must be a positive number")
        if all(value is None for value in figures.values()):
            raise UserError(f"--measured {path}: {SECTION} has none of {', '.join(_FIGURES)}")
        return cls(**figures)

    def put_into(self, cluster: Cluster) -> Cluster:
        """Give the cluster with the measured figures in place of its own."""
        figures = {name: getattr(self, name) for name in _FIGURES}
        return replace(cluster, **{name: value for name, value in figures.items() if value is not None})
