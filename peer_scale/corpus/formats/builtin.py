"""The built-in corpus: the prose of the installed packages' docstrings, so that a first run downloads nothing."""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peer_scale.corpus.formats.base import SAMPLED_BYTES, Source
from peer_scale.corpus.worker_pool import worker_pool

_NAME = "builtin"
# Distribution names with the folder below the import root that holds their sources.
_PACKAGES = {
    "numpy": "numpy",
    "torch": "torch",
    "transformers": "transformers",
    "deepspeed": "deepspeed",
    "megatron-core": "megatron/core",
    "datasets": "datasets",
}
_EXTRACTION = 1  # raise it whenever the rules below change: prepared corpora are keyed by it
_LEFT_OUT_FOLDERS = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_FILES_PER_TASK = 64
_MIN_WORDS = 6

_FENCE = re.compile(r"^\s*(```|~~~)")
_BULLET = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,2}[.)])\s+")
# "name (type): description" and "name -- description", also with the type's brackets open to the line's end
_ENTRY = re.compile(r"^\s*[`*]*[\w.*\[\]/, ]{1,40}?[`*]*\s*(?:\(.*?\)(?=:)|\([^:]*$)?\s*(?::(?=\s|$)|--\s)")
_FIELD = re.compile(r"^\s*:(?:param|arg|type|returns?|rtype|raises?|keyword|var|ivar|cvar)\b[^:]*:")
_DIRECTIVE = re.compile(r"^(\s*)\.\.\s")
_PROSE_DIRECTIVE = re.compile(
    r"^\s*\.\.\s+(?:note|warning|tip|important|versionadded|versionchanged|deprecated)::\s*[\d.]*"
)
_ROLE = re.compile(r":[a-z:+]+:`~?\.?([^`<]*?)(?:\s*<[^>]*>)?`")
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)|`([^`<]+?)\s*<[^>]*>`_*")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[.,;:!?)\"']*|\([A-Za-z]+[.,;:!?)\"']*")


@dataclass(frozen=True)
class BuiltinCorpus(Source):
    """The built-in corpus: one document per source file, in an order that only the texts decide."""

    @classmethod
    def takes(cls, name: str) -> bool:
        return name == _NAME

    def identity(self, sampled_bytes: int = SAMPLED_BYTES) -> list[str]:
        """Name what the documents are made from: the interpreter's and each package's version."""
        versions = [f"builtin {_EXTRACTION}", f"python {platform.python_version()}"]
        for distribution in _PACKAGES:
            try:
                versions.append(f"{distribution} {importlib.metadata.version(distribution)}")
            except importlib.metadata.PackageNotFoundError:
                continue
        return versions

    def documents(self, text_key: str) -> Iterator[str]:
        yield from extract_documents(root for root in _package_roots() if root.is_dir())


def extract_documents(roots: Iterable[Path]) -> Iterator[str]:
    """Yield the docstring prose of the Python sources below some folders.

    Args:
        roots: folders, read in this order: a docstring found twice counts where it is met first.

    Yields:
        One document per source file with any prose left, sorted by the text's hash.
    """
    files = [file for root in roots for file in _source_files(root)]
    tasks = [files[start : start + _FILES_PER_TASK] for start in range(0, len(files), _FILES_PER_TASK)]
    seen: set[bytes] = set()
    documents = []
    for docstrings in _parallel_docstrings(tasks):
        fresh = []
        for digest, prose in docstrings:
            if digest not in seen:
                seen.add(digest)
                fresh.append(prose)
        if fresh:
            documents.append("\n".join(fresh))
    yield from sorted(documents, key=_digest)


def prose(docstring: str) -> str:
    """Return what reads as sentences in a docstring: one paragraph per line, nothing where none does."""
    paragraphs = (_clean(paragraph) for paragraph in _paragraphs(inspect.cleandoc(docstring)))
    return "\n".join(_as_sentence(paragraph) for paragraph in paragraphs if _is_prose(paragraph))


def _package_roots() -> Iterator[Path]:
    yield Path(sysconfig.get_paths()["stdlib"])
    for folder in _PACKAGES.values():
        top, _, below = folder.partition("/")
        spec = importlib.util.find_spec(top)
        for location in (spec.submodule_search_locations or []) if spec else []:
            yield Path(location, below)


def _source_files(root: Path) -> list[str]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS]
        found += [os.path.join(folder, name) for name in names if name.endswith(".py") and not name.startswith("test_")]
    return sorted(found)


def _parallel_docstrings(tasks: Sequence[list[str]]) -> Iterator[list[tuple[bytes, str]]]:
    workers = min(len(os.sched_getaffinity(0)), len(tasks))
    if workers <= 1:
        for task in tasks:
            yield from _docstring_prose(task)
        return
    with worker_pool(workers) as pool:
        for files in pool.map(_docstring_prose, tasks):
            yield from files


def _docstring_prose(files: Sequence[str]) -> list[list[tuple[bytes, str]]]:
    """Return for every file its pairs of (docstring's digest, prose), those without prose left out."""
    result = []
    for file in files:
        pairs = ((_digest(docstring), prose(docstring)) for docstring in _docstrings(Path(file).read_bytes()))
        result.append([pair for pair in pairs if pair[1]])
    return result


def _docstrings(source: bytes) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield docstring


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def _paragraphs(text: str) -> Iterator[str]:
    """Cut at blank lines, bullets and parameter entries; leave out code, directives, doctests and headings."""
    lines: list[str] = []
    fenced = False
    skipped_indent: int | None = None  # inside a literal block or directive that is indented deeper than this
    for line in [*text.expandtabs().splitlines(), ""]:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if _FENCE.match(line):
            fenced = not fenced
            bare = ""
        elif fenced or (skipped_indent is not None and bare and indent > skipped_indent):
            continue
        elif bare:
            skipped_indent = None
        if _DIRECTIVE.match(line):
            skipped_indent = None if _PROSE_DIRECTIVE.match(line) else indent
            bare = _PROSE_DIRECTIVE.sub("", line).strip() if skipped_indent is None else ""
        start = _BULLET.match(line) or _ENTRY.match(line) or _FIELD.match(line)
        if not bare or start:
            if lines:
                yield " ".join(lines)
            lines = []
        if bare:
            lines.append(line[start.end() :].strip() if start else bare)
        if bare.endswith("::"):
            skipped_indent = indent


def _clean(paragraph: str) -> str:
    if ">>>" in paragraph:
        return ""
    text = _ROLE.sub(r"\1", paragraph)
    text = _LINK.sub(lambda match: match[1] or match[2], text)
    text = re.sub(r"`+|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)", "", text)
    return re.sub(r"\s+", " ", re.sub(r"::$", ":", text)).strip()


def _is_prose(text: str) -> bool:
    words = text.split()
    if len(words) < _MIN_WORDS or not text[0].isalpha() or not (_SENTENCE_END.search(text) or text[-1].isalnum()):
        return False
    return sum(1 for word in words if _WORD.fullmatch(word)) >= 0.75 * len(words)


def _as_sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if _SENTENCE_END.search(text) else ".")
