#!/usr/bin/env python3
"""Make the data of the small comparison: ten million words of text for pre-training and six tasks.

    python examples/small_comparison/prepare.py --output data/small

downloads seven packages (pinned, 52 MB) with pip and npm, and writes `pretraining/text.jsonl`, a folder per task in
`tasks/` and `manifest.json`. No text of a development or test example is in the pre-training text. The same seed gives
the same bytes. What the texts are and under which licences they stand is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from held_out import HeldOut
from packages import KING_JAMES, PACKAGES, WORLD_ENGLISH, download
from sources import Document, bible, brown, movie_reviews, news, wikipedia
from tasks import (
    PARTS,
    SIZES,
    Definitions,
    Sizes,
    Task,
    acceptability,
    relation,
    sentiment,
    similarity,
    topic,
    verse_pairs,
)
from wordnet import Synset, read_synsets

from peer_scale.errors import USER_ERROR_EXIT_CODE, UserError
from peer_scale.storage import write_aside, write_atomically


def make(packages: Path, seed: int, sizes: Sizes = SIZES) -> tuple[list[Document], list[Task]]:
    """Return the pre-training documents, shuffled, and the tasks."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    reviews, sentences = movie_reviews(packages)
    articles, introductions, samples = news(packages), wikipedia(packages), brown(packages)
    old, new = bible(packages, KING_JAMES), bible(packages, WORLD_ENGLISH)
    synsets = read_synsets(packages)
    definitions = Definitions.of(synsets, seed)

    topics, unseen_articles = topic(introductions, rng("topic"), sizes)
    verses, unseen_chapters = verse_pairs(old, new, seed, rng("verses"), sizes)
    acceptable, unseen_documents = acceptability([*articles, *samples], seed, rng("acceptability"), sizes)
    tasks = [
        sentiment(sentences, rng("sentiment"), sizes),
        acceptable,
        topics,
        verses,
        relation(definitions, rng("relation"), sizes),
        similarity(definitions, rng("similarity"), sizes),
    ]

    documents = [*reviews]
    documents += [document for document in (*articles, *samples) if document.name not in unseen_documents]
    documents += [document for document, _ in introductions if document.name not in unseen_articles]
    documents += [*_chapters("king james", old, unseen_chapters), *_chapters("world english", new, unseen_chapters)]
    documents += _dictionary(
        synset for key, synset in synsets.items() if definitions.parts.get(key, "train") == "train"
    )
    held_out = HeldOut(text for task in tasks for text in sorted(task.held_out_texts))
    documents = held_out.cleared(documents)
    rng("order").shuffle(documents)
    return documents, tasks


def _chapters(translation: str, verses: dict[int, str], unseen: set[int]) -> list[Document]:
    """Return a translation's chapters that are not held out, one verse per paragraph."""
    chapters: dict[int, list[str]] = {}
    for number, verse in sorted(verses.items()):
        chapters.setdefault(number // 1000, []).append(verse)
    return [Document(f"{translation} {key}", tuple(text)) for key, text in chapters.items() if key not in unseen]


def _dictionary(synsets: Iterable[Synset], per_document: int = 10) -> list[Document]:
    """Return WordNet's entries, some neighbours per document."""
    entries = [synset.entry for synset in synsets]
    return [
        Document(f"wordnet {begin}", tuple(entries[begin : begin + per_document]))
        for begin in range(0, len(entries), per_document)
    ]


def write(output: Path, documents: list[Document], tasks: list[Task], seed: int) -> None:
    """Write the text, the tasks, and last manifest.json, which says how much there is of each and its checksum."""
    checksums = {}
    path = output / "pretraining/text.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as file:
        for document in documents:
            file.write(
                json.dumps({"text": document.text, "source": document.name}, ensure_ascii=False).encode() + b"\n"
            )
    written = [path]
    for task in tasks:
        folder = output / "tasks" / task.name
        folder.mkdir(parents=True, exist_ok=True)
        for part in PARTS:
            lines = ["\t".join(row) for row in [(*task.columns, "label"), *task.rows[part]]]
            write_atomically(folder / f"{part}.tsv", "".join(f"{line}\n" for line in lines).encode())
            written.append(folder / f"{part}.tsv")
        description = {
            "name": task.name,
            "kind": task.kind,
            "metric": task.metric,
            "columns": list(task.columns),
            "label": "label",
        }
        write_atomically(folder / "task.json", f"{json.dumps(description, indent=2)}\n".encode())
    for path in written:
        checksums[str(path.relative_to(output))] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = {
        "seed": seed,
        "packages": {package.file: package.sha256 for package in PACKAGES},
        "words": words_by_source(documents),
        "tasks": {task.name: {part: len(task.rows[part]) for part in PARTS} for task in tasks},
        "sha256": checksums,
    }
    write_atomically(output / "manifest.json", f"{json.dumps(manifest, indent=2)}\n".encode())


def words_by_source(documents: Iterable[Document]) -> dict[str, int]:
    """Return the number of words of every source: a document's name begins with it."""
    words: Counter[str] = Counter()
    for document in documents:
        words[document.name.partition(" ")[0]] += len(document.text.split())
    return dict(sorted(words.items()))


def print_baselines(tasks: list[Task]) -> None:
    """Print the table of what is reached without pre-training, as Markdown."""
    from baselines import baselines  # its imports take seconds

    print("| task | metric | train / dev / test | majority | overlap and length | TF-IDF |\n|---|---|---|---|---|---|")
    for task in tasks:
        scores = [f"{score:.1f}" if score is not None else "" for score in baselines(task).values()]
        sizes = " / ".join(f"{len(task.rows[part]):,}" for part in PARTS)
        print(f"| {task.name} | {task.metric} | {sizes} | {' | '.join(scores)} |", flush=True)


def main() -> int:
    """Prepare everything; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the data")
    parser.add_argument(
        "--packages", type=Path, metavar="DIR", help="folder of the packages; default: packages in --output"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the splits and the made examples (default 1234)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out the table at the end, half a minute")
    args = parser.parse_args()
    packages = args.packages or args.output / "packages"
    try:
        download(packages)
        documents, tasks = make(packages, args.seed)
        write(args.output, documents, tasks, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    words = words_by_source(documents)
    print(f"{args.output}: {sum(words.values()):,} words in {len(documents):,} documents, {len(tasks)} tasks")
    if not args.no_baselines:
        print_baselines(tasks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
