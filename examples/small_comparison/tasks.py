"""The tasks: examples for training, development and test, split by document, chapter or synset."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from acceptability import judged
from held_out import SHORTEST
from sources import Document, normalised_words
from verses import matched_pairs
from wordnet import NounTree, Synset

PARTS = ("train", "dev", "test")
Row = tuple[str, ...]
Sizes = Mapping[str, int]  # of each part, at most
SIZES: Sizes = {"train": 8000, "dev": 1000, "test": 2000}


@dataclass(frozen=True)
class Task:
    """Rows of (text, label) or (text, text, label) for each of PARTS, and further texts that must not be trained on."""

    name: str
    kind: str  # "classification" or "regression"
    metric: str
    rows: dict[str, list[Row]]
    unseen: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the names of the text columns."""
        return ("text",) if len(self.rows["train"][0]) == 2 else ("text_a", "text_b")

    @property
    def held_out_texts(self) -> set[str]:
        """Return all texts of development and test examples, and `unseen`."""
        texts = {text for part in ("dev", "test") for row in self.rows[part] for text in row[:-1]}
        return texts.union(self.unseen)


def part_of(key: str, seed: int, dev: float, test: float) -> str:
    """Return the part that a document, chapter or synset belongs to, by the hash of its key."""
    place = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big") / 2**64
    return "test" if place < test else "dev" if place < test + dev else "train"


def split_by_key(keys: Iterable[str], seed: int, dev: float, test: float) -> dict[str, list[str]]:
    """Return the keys of each part, in their order."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for key in keys:
        parts[part_of(key, seed, dev, test)].append(key)
    return parts


def _parted(rows: Sequence[Row], sizes: Sizes) -> dict[str, list[Row]]:
    """Return shuffled rows cut into dev and test of their sizes, and the rest for training."""
    dev, test = sizes["dev"], sizes["test"]
    return {"dev": list(rows[:dev]), "test": list(rows[dev : dev + test]), "train": list(rows[dev + test :])}


def _cut(rows: dict[str, list[Row]], sizes: Sizes) -> dict[str, list[Row]]:
    """Return at most `sizes` rows of each part, and none for training of which a text is in one of the others."""
    evaluated = {part: rows[part][: sizes[part]] for part in ("dev", "test")}
    texts = {_key(text) for part in evaluated.values() for row in part for text in row[:-1]}
    train = [row for row in rows["train"] if not any(_key(text) in texts for text in row[:-1])]
    return {"train": train[: sizes["train"]], **evaluated}


def _key(text: str) -> str:
    return " ".join(normalised_words(text))


def sentiment(sentences: Sequence[tuple[str, str]], rng: random.Random, sizes: Sizes = SIZES) -> Task:
    """Return the sentences of film reviews, positive or negative (SST-2's kind)."""
    shuffled = rng.sample(list(sentences), len(sentences))
    long = [row for row in shuffled if len(normalised_words(row[0])) >= SHORTEST]
    short = [row for row in shuffled if len(normalised_words(row[0])) < SHORTEST]
    return Task("rotten_tomatoes", "classification", "accuracy", _cut(_parted([*long, *short], sizes), sizes))


def topic(
    articles: Sequence[tuple[Document, str]], rng: random.Random, sizes: Sizes = SIZES, words: int = 30
) -> tuple[Task, set[str]]:
    """Return the first words of Wikipedia's introductions with their topics, and the names of the held-out articles."""
    beginnings = {article.name: " ".join(article.text.split()[:words]) for article, _ in articles}
    usable = [
        (article.name, label.replace(" ", "_"))
        for article, label in articles
        if label != "Uncategorized" and len(normalised_words(beginnings[article.name])) >= SHORTEST
    ]
    rng.shuffle(usable)
    rows = [(beginnings[name], label) for name, label in usable]
    held_out = {name for name, _ in usable[: sizes["dev"] + sizes["test"]]}
    return Task("wiki_topic", "classification", "accuracy", _cut(_parted(rows, sizes), sizes)), held_out


def verse_pairs(
    old: dict[int, str],
    new: dict[int, str],
    seed: int,
    rng: random.Random,
    sizes: Sizes = SIZES,
    shortest: int = 6,
    longest: int = 25,
) -> tuple[Task, set[int]]:
    """Return pairs of verses of two translations, the same verse or not, and the numbers of the held-out chapters."""
    chapters = split_by_key(dict.fromkeys(str(number // 1000) for number in old), seed, dev=0.15, test=0.31)
    rows: dict[str, list[Row]] = {}
    for part in PARTS:
        inside = set(chapters[part])
        numbers = [
            number
            for number in sorted(old.keys() & new.keys())
            if str(number // 1000) in inside
            and all(shortest <= len(normalised_words(verse)) <= longest for verse in (old[number], new[number]))
        ]
        rows[part] = list(matched_pairs(old, new, numbers, rng))
    held_out = {int(chapter) for part in ("dev", "test") for chapter in chapters[part]}
    return Task("verse_pairs", "classification", "accuracy", _cut(rows, sizes)), held_out


def acceptability(
    documents: Sequence[Document], seed: int, rng: random.Random, sizes: Sizes = SIZES
) -> tuple[Task, set[str]]:
    """Return sentences, half of them spoilt (CoLA's kind, but made), and the names of the held-out documents."""
    by_name = {document.name: document for document in documents}
    names = split_by_key(by_name, seed, dev=0.06, test=0.11)
    made = {part: judged((by_name[name] for name in names[part]), rng) for part in PARTS}
    rows = _cut({part: [(one.text, one.label) for one in made[part]] for part in PARTS}, sizes)
    unseen = tuple(one.original for part in ("dev", "test") for one in made[part][: sizes[part]])
    held_out = {*names["dev"], *names["test"]}
    return Task("acceptability", "classification", "mcc", rows, unseen), held_out


@dataclass(frozen=True)
class Definitions:
    """The synsets with definitions that the tasks take, and the part of each."""

    synsets: dict[str, Synset]
    parts: dict[str, str]

    @classmethod
    def of(cls, synsets: dict[str, Synset], seed: int, longest: int = 24) -> Definitions:
        """Choose nouns and verbs whose definitions are of middling length and no other synset's."""
        first: dict[str, str] = {}
        for key, synset in synsets.items():
            words = normalised_words(synset.definition)
            if key[0] in "nv" and SHORTEST <= len(words) <= longest:
                first.setdefault(" ".join(words), key)
        return cls(synsets, {key: part_of(key, seed, dev=0.13, test=0.24) for key in first.values()})

    def within(self, keys: Iterable[str], part: str) -> list[str]:
        """Return those of the keys that belong to a part."""
        return [key for key in keys if self.parts.get(key) == part]


def relation(definitions: Definitions, rng: random.Random, sizes: Sizes = SIZES, per_parent: int = 3) -> Task:
    """Return pairs of definitions: the second broader than the first, narrower, or its sibling (a kind of NLI).

    The second definition of a sibling pair has narrower ones itself, so that how general a text sounds does not tell
    siblings from the others; and no synset is the broader one of more than `per_parent` pairs.
    """
    rows: dict[str, list[Row]] = {}
    synsets = definitions.synsets
    for part in PARTS:
        found: dict[str, list[Row]] = defaultdict(list)
        for key, parent in synsets.items():
            children = definitions.within(parent.hyponyms, part)
            if definitions.parts.get(key) == part:
                for child in rng.sample(children, min(per_parent, len(children))):
                    pair = synsets[child].definition, parent.definition
                    if rng.random() < 0.5:
                        found["broader"].append((*pair, "broader"))
                    else:
                        found["narrower"].append((*pair[::-1], "narrower"))
            general = [child for child in children if synsets[child].hyponyms]
            for second in rng.sample(general, min(per_parent, len(general))):
                others = [child for child in children if child != second]
                if others:
                    pair = synsets[rng.choice(others)].definition, synsets[second].definition
                    found["sibling"].append((*(pair if rng.random() < 0.5 else pair[::-1]), "sibling"))
        count = min(map(len, found.values()))
        rows[part] = [row for label in sorted(found) for row in rng.sample(found[label], count)]
        rng.shuffle(rows[part])
    return Task("wordnet_relation", "classification", "accuracy", _cut(rows, sizes))


def similarity(definitions: Definitions, rng: random.Random, sizes: Sizes = SIZES, bins: int = 6) -> Task:
    """Return pairs of nouns' definitions with the similarity of the nouns in WordNet's tree, 0 to 5 (STS-B's kind).

    Wu and Palmer's similarity; as many pairs from each of `bins` equal intervals of it, chosen by walks up and down the
    tree.
    """
    tree = NounTree(definitions.synsets)
    rows: dict[str, list[Row]] = {}
    for part in PARTS:
        keys = [key for key, its_part in definitions.parts.items() if its_part == part and key[0] == "n"]
        found: dict[int, dict[frozenset[str], Row]] = defaultdict(dict)
        wanted = -(-sizes[part] // bins)
        for _ in range(100 * sizes[part]):
            first = rng.choice(keys)
            second = _walk(definitions, first, part, rng)
            value = tree.similarity(first, second) if second and second != first else 0.0
            pairs = found[min(int(value * bins), bins - 1)]
            if value and len(pairs) < wanted:
                texts = (definitions.synsets[first].definition, definitions.synsets[second].definition)
                pairs.setdefault(frozenset((first, second)), (*texts, f"{5 * value:.3f}"))
        rows[part] = [row for number in sorted(found) for row in found[number].values()]
        rng.shuffle(rows[part])
    return Task("wordnet_similarity", "regression", "pearson_spearman", _cut(rows, sizes))


def _walk(definitions: Definitions, key: str, part: str, rng: random.Random) -> str:
    """Go up some hypernyms and down some hyponyms; return where that ends if it is of the same part, else ''."""
    synsets = definitions.synsets
    for _ in range(rng.randrange(9)):
        if synsets[key].hypernyms:
            key = rng.choice(synsets[key].hypernyms)
    for _ in range(rng.randrange(9)):
        below = synsets[key].hyponyms
        if not below:
            break
        key = rng.choice(below)
    return key if definitions.parts.get(key) == part else ""
