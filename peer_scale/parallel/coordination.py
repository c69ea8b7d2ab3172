"""What one rank finds out, all know: results and user errors are shared, so that no rank is left waiting."""

from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from peer_scale.errors import UserError

T = TypeVar("T")


class RankCoordinator:
    """Talk over a gloo group of its own with a patient timeout: the first rank may tokenise a corpus for hours."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=2))

    @property
    def is_first_rank(self) -> bool:
        """True on global rank 0."""
        return dist.get_rank(self._group) == 0

    def first_rank(self, action: Callable[[], T]) -> T:
        """Run `action` on global rank 0 only; all ranks get its (picklable) result or its UserError."""
        outcome: list = [None, None]
        if dist.get_rank(self._group) == 0:
            outcome = list(_attempt(action))
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    def everyone(self, action: Callable[[], T]) -> T:
        """Run `action` on all ranks; if any raises UserError, all raise the one of the lowest such rank."""
        value, error = _attempt(action)
        for message in self.exchange(error):
            if message is not None:
                raise UserError(message)
        return cast(T, value)

    def all(self, value: bool) -> bool:
        """Say whether `value` is true on all ranks."""
        vote = torch.tensor(int(value))
        dist.all_reduce(vote, dist.ReduceOp.MIN, group=self._group)
        return bool(vote)

    def exchange(self, value: T) -> list[T]:
        """Give the (picklable) values of all ranks in their order, on all ranks."""
        values: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather(self, value: T) -> list[T]:
        """Give the (picklable) values of all ranks in their order, on global rank 0; elsewhere nothing."""
        is_first = dist.get_rank(self._group) == 0
        values: list = [None] * dist.get_world_size(self._group) if is_first else []
        dist.gather_object(value, values if is_first else None, dst=0, group=self._group)
        return values

    def one_by_one(self, action: Callable[[], T]) -> T:
        """Rank 0 first, then all others at once: for what the first one prepares and the rest find done."""
        is_first = dist.get_rank(self._group) == 0
        value, error = _attempt(action) if is_first else (None, None)
        outcome = [error]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0] is not None:
            raise UserError(outcome[0])
        return self.everyone((lambda: cast(T, value)) if is_first else action)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
