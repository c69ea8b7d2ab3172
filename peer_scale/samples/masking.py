"""Which positions of a sample are selected for prediction, and how many of them show [MASK]."""

from typing import Annotated

from pydantic import Field

from peer_scale.configuration import configuration, option


@configuration
class MaskingConfig:
    """Corruption of the generator's input.

    `mask_fraction` of a sequence's tokens are selected. Of these the share `mask_probability` shows [MASK]; the rest
    stay as they are (PEER masks all, Section 3.1; google-research/electra 85 %).
    """

    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = option(
        default=0.15, help="Share of a sequence's tokens that are selected for prediction.", metavar="SHARE"
    )
    mask_probability: Annotated[float, Field(ge=0, le=1)] = option(
        default=1.0, help="Share of the selected tokens that show [MASK]; the rest stay as they are.", metavar="SHARE"
    )

    def num_predictions(self, num_tokens: int) -> int:
        """Count the positions selected of a sequence of `num_tokens` non-pad tokens."""
        return max(1, round(self.mask_fraction * num_tokens))
