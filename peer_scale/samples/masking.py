"""Which positions of a sample are selected for prediction, and how many of them show [MASK]."""

from dataclasses import dataclass

from peer_scale.errors import UserError


@dataclass(frozen=True)
class MaskingConfig:
    """Corruption of the generator's input.

    `mask_fraction` of a sequence's tokens are selected. Of these the share `mask_probability` shows [MASK]; the rest
    stay as they are (PEER masks all, Section 3.1; google-research/electra 85 %).
    """

    mask_fraction: float = 0.15
    mask_probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.mask_fraction < 1:
            raise UserError(f"mask_fraction is {self.mask_fraction}; it must lie between 0 and 1")
        if not 0 <= self.mask_probability <= 1:
            raise UserError(f"mask_probability is {self.mask_probability}; it must lie between 0 and 1")

    def num_predictions(self, num_tokens: int) -> int:
        """Count the positions selected of a sequence of `num_tokens` non-pad tokens."""
        return max(1, round(self.mask_fraction * num_tokens))
