"""What is learned: masking, rank levels and loss weights."""

import itertools
import math
from dataclasses import dataclass

from peer_scale.errors import UserError


@dataclass(frozen=True)
class ObjectiveConfig:
    """PEER's hyper-parameters (Section 3; Appendix A); two levels make ELECTRA's replaced-token detection.

    `taus` has K-2 entries and `gammas` K-2 (or one for all); `warmup_epochs` is how long only the first term of Eq. 5
    is used. `mask_probability` is the share of the selected positions that show [MASK]; the rest stay as
    they are.
    """

    num_levels: int = 3
    taus: tuple[float, ...] = (1.0,)
    top_t: int = 3
    delta: float = 3.0
    gammas: tuple[float, ...] = (0.5,)
    tqr_weight: float = 50.0
    warmup_epochs: float = 0.8
    mask_fraction: float = 0.15
    mask_probability: float = 1.0

    def __post_init__(self) -> None:
        check_levels(self.num_levels, self.taus, self.delta)
        if len(self.gammas) not in (1, self.num_levels - 2) or min(self.gammas) <= 0:
            wanted = f"one positive weight, or {self.num_levels - 2}"
            raise UserError(f"gammas {list(self.gammas)}: {self.num_levels} levels take {wanted}")
        if self.top_t < 1:
            raise UserError(f"top_t is {self.top_t}; it must be at least 1")
        if self.tqr_weight < 0:
            raise UserError(f"tqr_weight is {self.tqr_weight}; it must not be negative")
        if self.warmup_epochs < 0:
            raise UserError(f"warmup_epochs is {self.warmup_epochs}; it must not be negative")
        if not 0 < self.mask_fraction < 1:
            raise UserError(f"mask_fraction is {self.mask_fraction}; it must lie between 0 and 1")
        if not 0 <= self.mask_probability <= 1:
            raise UserError(f"mask_probability is {self.mask_probability}; it must lie between 0 and 1")

    def num_predictions(self, num_tokens: int) -> int:
        """Positions selected of a sequence of `num_tokens` non-pad tokens."""
        return max(1, round(self.mask_fraction * num_tokens))


def check_levels(num_levels: int, taus: tuple[float, ...], delta: float) -> None:
    """Raise UserError unless K >= 2 and tau_k (1 + delta) <= tau_{k+1} for k = 1..K-3 (footnote 4)."""
    if num_levels < 2:
        raise UserError(f"num_levels (K) is {num_levels}; a ranker needs at least 2")
    if len(taus) != num_levels - 2:
        raise UserError(f"taus {list(taus)}: K = {num_levels} levels take {num_levels - 2} values")
    if any(not math.isfinite(tau) or tau <= 0 for tau in taus):
        raise UserError(f"taus {list(taus)}: each must be positive")
    if not math.isfinite(delta) or delta < 0:
        raise UserError(f"delta is {delta}; it must not be negative")
    for index, (tau, following) in enumerate(itertools.pairwise(taus), start=1):
        if tau >= following or tau * (1 + delta) > following:
            raise UserError(
                f"tau_{index} (1 + delta) = {tau:g} x {1 + delta:g} must not exceed tau_{index + 1} = {following:g}: "
                f"lower delta or spread the taus {list(taus)}"
            )
