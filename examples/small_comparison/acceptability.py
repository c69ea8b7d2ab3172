"""Sentences as printed, and the same kind of sentence with one word moved, changed or left out."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

from sources import Document

PER_DOCUMENT = 8  # sentences taken of one document at most
DETERMINERS = {"the", "a", "an", "this", "these", "its", "his", "her", "their", "our", "my", "your"}
PREPOSITIONS = {"of", "in", "on", "at", "by", "for", "from", "with", "into", "to"}
AUXILIARIES = {"is", "are", "was", "were", "has", "have", "had", "will", "would", "can", "could", "be", "been", "not"}
FUNCTION_WORDS = DETERMINERS | PREPOSITIONS | AUXILIARIES | {"and", "or", "but", "that", "which", "who", "as", "than"}
AGREEMENT = {"is": "are", "was": "were", "has": "have", "this": "these", "does": "do", "a": "an"}
AGREEMENT |= {other: one for one, other in AGREEMENT.items()}
DROPPED = {"of", "to", "from", "with", "at", "into"}
SPARED_BEFORE_OF = {"all", "both", "half", "outside", "inside", "off"}  # "all of the" is as good as "all the"


@dataclass(frozen=True)
class Judged:
    """A sentence, its label, and the sentence that was printed."""

    text: str
    label: str
    original: str


def sentences(document: Document) -> list[str]:
    """Return the plain sentences of a document: 6 to 24 words, no quotation, no abbreviation, nothing in brackets."""
    found = []
    for paragraph in document.paragraphs:
        for sentence in re.split(r"(?<=[a-z]{2}[.!?]) (?=[A-Z])", paragraph):
            plain = re.fullmatch(r"[A-Z][A-Za-z0-9 ,;'-]*[a-z]{2}\.", sentence) and " ," not in sentence
            if plain and 6 <= len(sentence.split()) <= 24:
                found.append(sentence)
    return list(dict.fromkeys(found))


def judged(documents: Iterable[Document], rng: random.Random) -> list[Judged]:
    """Return sentences of the documents, half of them made unacceptable, in random order."""
    good: list[Judged] = []
    bad: list[Judged] = []
    for document in documents:
        found = sentences(document)
        for sentence in rng.sample(found, min(PER_DOCUMENT, len(found))):
            made = _spoilt(sentence, rng)
            if made is None:
                continue  # a sentence that offers no place for a fault would always be acceptable
            if rng.random() < 0.5:
                good.append(Judged(sentence, "acceptable", sentence))
            else:
                bad.append(Judged(made, "unacceptable", sentence))
    count = min(len(good), len(bad))
    both = rng.sample(good, count) + rng.sample(bad, count)
    rng.shuffle(both)
    return both


def _spoilt(sentence: str, rng: random.Random) -> str | None:
    """Return the sentence with one fault of a random kind, None where it offers no place for any."""
    words = sentence.split(" ")
    for make in rng.sample((_swapped, _disagreeing, _dropped), 3):
        made = make(words, rng)
        if made is not None:
            return " ".join(made)
    return None


def _swapped(words: list[str], rng: random.Random) -> list[str] | None:
    """Swap a function word with the content word behind it: `in the house` becomes `in house the`."""
    places = [
        at
        for at in range(1, len(words) - 2)
        if words[at] in DETERMINERS | PREPOSITIONS | AUXILIARIES
        and words[at + 1].isalpha()
        and words[at + 1].islower()
        and words[at + 1] not in FUNCTION_WORDS
    ]
    if not places:
        return None
    at = rng.choice(places)
    return [*words[:at], words[at + 1], words[at], *words[at + 2 :]]


def _disagreeing(words: list[str], rng: random.Random) -> list[str] | None:
    """Change one word into the form that does not agree: `this` into `these`, `is` into `are`."""
    places = [at for at, word in enumerate(words) if at > 0 and word in AGREEMENT]
    if not places:
        return None
    at = rng.choice(places)
    return [*words[:at], AGREEMENT[words[at]], *words[at + 1 :]]


def _dropped(words: list[str], rng: random.Random) -> list[str] | None:
    """Leave out one function word that the sentence needs."""
    places = [
        at
        for at, word in enumerate(words)
        if at > 0 and word in DROPPED and not (word == "of" and words[at - 1] in SPARED_BEFORE_OF)
    ]
    if not places:
        return None
    at = rng.choice(places)
    return [*words[:at], *words[at + 1 :]]
