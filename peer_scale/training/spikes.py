"""Steps whose loss or gradient norm is far above those of the steps before."""

from __future__ import annotations

from collections import deque

import numpy as np

from peer_scale.checkpoints.sections import RecentSteps

_WINDOW = 128
_FEWEST = 64


class SpikeWatch:
    """Gives the limits of a step: so many standard deviations above the mean of the last 128 finite ones.

    The step before is not among them: the host does not know its numbers yet when it launches the next. So the limits
    are the same for a run that was stopped in between, if it takes over what was `recent`.
    """

    def __init__(self, sigmas: float, recent: RecentSteps | None = None) -> None:
        """Set limits of `sigmas` standard deviations; `recent` is of the checkpoint that the run goes on from."""
        self._sigmas = sigmas
        self.put_back(recent)

    def put_back(self, recent: RecentSteps | None) -> None:
        """Take over what was recent at an earlier time; None: nothing was."""
        rows = [] if recent is None else list(zip(recent.steps, recent.losses, recent.grad_norms, strict=True))
        self._rows: deque[tuple[int, float, float]] = deque(rows, maxlen=_WINDOW + 1)

    @property
    def recent(self) -> RecentSteps:
        """What limits of later steps follow from."""
        steps, losses, norms = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        return RecentSteps(steps, losses, norms)

    def note(self, step: int, loss: float, grad_norm: float) -> None:
        """Take in a step's finite numbers; 0 for a norm that is not known."""
        self._rows.append((step, loss, grad_norm))

    def limits(self, step: int) -> tuple[float, float] | None:
        """Give the greatest loss and gradient norm that are no spike in `step`; None after too few steps."""
        known = [row[1:] for row in self._rows if row[0] <= step - 2][-_WINDOW:]
        if len(known) < _FEWEST:
            return None
        values = np.array(known)
        # in fp32, as the device compares
        loss, norm = (values.mean(0) + self._sigmas * values.std(0)).astype(np.float32).tolist()
        return loss, norm
