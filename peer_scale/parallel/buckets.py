"""How many numbers ZeRO sends at once where the ds_config leaves it open ("auto")."""

from __future__ import annotations

from dataclasses import dataclass

_FEWEST = 1 << 20
_MOST = 50_000_000
_MOST_AHEAD = 10_000_000
_MESSAGES_PER_STEP = 4


@dataclass(frozen=True)
class Buckets:
    """Numbers, not bytes.

    Attributes:
        reduce: gradients that are gathered before they are sent; each message waits for the one before it.
        prefetch: parameters that ZeRO-3 fetches ahead of the layers that need them.
    """

    reduce: int
    prefetch: int


def bucket_sizes(num_parameters: int, data_parallel: int, *, on_gpu: bool) -> Buckets:
    """Choose the sizes for a rank that holds `num_parameters` (its stage's and tensor-parallel share).

    Gradients go in a few messages per step: in one, none could be sent while backward is still at work; in many, each
    takes as long as the network needs to answer, which grows with the number of ranks. A rank without others to send to
    copies gradients, on a CPU through a small bucket, which stays in the processor's caches; a GPU waits for the host
    at each bucket.
    """
    if data_parallel == 1 and not on_gpu:
        return Buckets(_FEWEST, _FEWEST)
    reduce = min(max(num_parameters // _MESSAGES_PER_STEP, _FEWEST), _MOST)
    return Buckets(reduce, min(reduce, _MOST_AHEAD))
