"""WordNet's synsets: definitions, examples and the tree of hypernyms."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from packages import WORDNET, read_tarball
from sources import one_line


@dataclass
class Synset:
    """One sense: its words, definition, examples of use, and the keys of its hypernyms."""

    key: str
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    hypernyms: tuple[str, ...]
    hyponyms: list[str] = field(default_factory=list)

    @property
    def entry(self) -> str:
        """Return the synset as a dictionary prints it."""
        return f"{', '.join(self.words)}: {'; '.join((self.definition, *self.examples))}."


def read_synsets(folder: Path) -> dict[str, Synset]:
    """Return all synsets by key (part of speech and offset), in the order of the files, with both ways of the tree."""
    files = read_tarball(folder, WORDNET)
    synsets = {}
    for kind, part in (("n", "noun"), ("v", "verb"), ("a", "adj"), ("r", "adv")):
        for line in files[f"dict/data.{part}"].decode().splitlines():
            if not line.startswith(" "):
                synset = _parse(line, kind)
                synsets[synset.key] = synset
    for synset in synsets.values():
        for parent in synset.hypernyms:
            synsets[parent].hyponyms.append(synset.key)
    return synsets


def _parse(line: str, kind: str) -> Synset:
    """Return the synset of one line of a data file (format: WordNet's manual page wndb)."""
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    count = int(fields[3], 16)
    words = tuple(re.sub(r"\(.*\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
    pointers = fields[5 + 2 * count :]
    hypernyms = tuple(
        kind + pointers[at + 1]
        for at in range(0, 4 * int(fields[4 + 2 * count]), 4)
        if pointers[at] in ("@", "@i") and pointers[at + 2] == kind
    )
    examples = tuple(one_line(example) for example in re.findall(r'"([^"]+)"', gloss))
    definition = one_line(re.split(r';?\s*"', gloss, maxsplit=1)[0]).rstrip("; ")
    return Synset(kind + fields[0], words, definition, examples, hypernyms)


class NounTree:
    """Ancestors, depths and similarities of noun synsets."""

    def __init__(self, synsets: dict[str, Synset]) -> None:
        self._synsets = synsets
        self.depth = cache(self._depth)
        self.ancestors = cache(self._ancestors)

    def _depth(self, key: str) -> int:
        """Return the number of synsets on the longest way to the root, both ends counted."""
        return 1 + max((self.depth(parent) for parent in self._synsets[key].hypernyms), default=0)

    def _ancestors(self, key: str) -> frozenset[str]:
        """Return the synset and all above it."""
        return frozenset({key}).union(*(self.ancestors(parent) for parent in self._synsets[key].hypernyms))

    def similarity(self, first: str, second: str) -> float:
        """Return Wu and Palmer's similarity: twice the deepest common ancestor's depth over the sum of both depths."""
        common = self.ancestors(first) & self.ancestors(second)
        deepest = max((self.depth(key) for key in common), default=0)
        return 2 * deepest / (self.depth(first) + self.depth(second))
