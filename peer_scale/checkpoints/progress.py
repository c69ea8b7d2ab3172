"""How far a run has come."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Cumulative over restarts; saved with every checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
