"""Which text is trained on and which is held out for validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from peer_scale.corpus.store import TokenStore
from peer_scale.errors import UserError

SplitRule: TypeAlias = Literal["tokens", "documents"]
"""What a share of the text is a share of. Runs begin with "tokens"; "documents" is how earlier versions held out."""


@dataclass(frozen=True)
class Part:
    """Documents [first, last) of a store but for the first `skip` tokens of them and the last `cut`."""

    first: int
    last: int
    skip: int = 0
    cut: int = 0

    @property
    def num_documents(self) -> int:
        """Count the documents of which something is in this part."""
        return self.last - self.first


def split_text(store: TokenStore, fraction: float, rule: SplitRule) -> tuple[Part, Part | None]:
    """Give the part that is trained on, and the part held out: the last `fraction` of the text, None where that is 0.

    Every token is in exactly one of them. The time it takes does not depend on the size of the text.

    Raises:
        UserError: nothing would be left to train on.
    """
    if fraction == 0:
        return Part(0, store.num_documents), None
    return _by_tokens(store, fraction) if rule == "tokens" else _by_documents(store, fraction)


def _by_tokens(store: TokenStore, fraction: float) -> tuple[Part, Part]:
    """Hold out that many tokens, at least one.

    The cut is moved to the nearest end of a document where that changes neither part by more than half of the smaller
    one, so that ordinary documents stay whole; a longer document is cut.
    """
    held_out = max(1, round(store.num_tokens * fraction))
    cut = store.num_tokens - held_out
    if cut < 1:
        raise _too_little(f"{store.num_tokens} token(s)", held_out)
    document = store.document_at(cut)
    begin, end = store.token_offset(document), store.token_offset(document + 1)
    nearest = min((begin, end), key=lambda boundary: abs(boundary - cut))
    if 2 * abs(nearest - cut) <= min(held_out, cut):
        first = document if nearest == begin else document + 1
        return Part(0, first), Part(first, store.num_documents)
    return Part(0, document + 1, cut=end - cut), Part(document, store.num_documents, skip=cut - begin)


def _by_documents(store: TokenStore, fraction: float) -> tuple[Part, Part]:
    """Hold out that many documents, at least one, of whatever length."""
    held_out = max(1, round(store.num_documents * fraction))
    first = store.num_documents - held_out
    if first < 1:
        raise _too_little(f"{store.num_documents} document(s)", held_out)
    return Part(0, first), Part(first, store.num_documents)


def _too_little(found: str, held_out: int) -> UserError:
    return UserError(
        f"the data has {found}, too few to hold {held_out} out for validation: "
        "give more text, or --validation-fraction 0"
    )
