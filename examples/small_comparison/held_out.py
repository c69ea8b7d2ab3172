"""What keeps the text of dev and test examples out of the pre-training text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from sources import Document, normalised_words

SHORTEST = 5  # words of a text that is worth holding out: fewer occur anywhere by chance


class HeldOut:
    """Texts of at least SHORTEST words, found again inside other texts whatever their case and punctuation."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._by_beginning: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
        for text in texts:
            words = normalised_words(text)
            if len(words) < SHORTEST:
                raise ValueError(f"only {len(words)} words, too few to be held out: {text!r}")
            self._by_beginning[tuple(words[:SHORTEST])].append(words)

    def within(self, text: str) -> bool:
        """Return whether any of the held-out texts occurs in `text`, word for word."""
        words = normalised_words(text)
        for at in range(len(words) - SHORTEST + 1):
            for held in self._by_beginning.get(tuple(words[at : at + SHORTEST]), ()):
                if words[at : at + len(held)] == held:
                    return True
        return False

    def cleared(self, documents: Iterable[Document]) -> list[Document]:
        """Return the documents without the paragraphs, or else without the documents, that hold a held-out text."""
        kept = []
        for document in documents:
            paragraphs = tuple(part for part in document.paragraphs if not self.within(part))
            cleared = Document(document.name, paragraphs)
            if paragraphs and not self.within(cleared.text):
                kept.append(cleared)
        return kept
