"""Random documents in random files come out as an independent reader and transformers' tokenizer give them."""

import bz2
import gzip
import json
import lzma
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast

from peer_scale.corpus.parts import cut_into_parts, read_part, write_part
from peer_scale.corpus.readers import find_inputs
from peer_scale.corpus.wordpiece import load_wordpiece
from peer_scale.errors import UserError

LETTERS = "abcdeé中文。,!"
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"abcde中,!",
    *(f"##{letter}" for letter in "abcd"),
    "ab",
    "abc",
]
SPACES = [" ", "  ", "\t", "\u00a0", "\u3000", "\u2003", "\x0b", "\x1f", "\x85", "\u2028"]  # none ends a line of a file
BLANKS = ["", " ", "\t ", "\u3000", "\u00a0 ", "\x0c", "\x1c", "\u2028"]
COMPRESSIONS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    ".GZ": gzip.compress,
}
LINES, ARRAY, PRETTY, TEXT, TABLE = "lines", "array", "pretty", "text", "table"
ENDINGS = {
    LINES: [".jsonl", ".ndjson", ".json", ".JSONL", "", ".00017"],
    ARRAY: [".json", ".jsonl", ""],
    PRETTY: [".json", ".ndjson", ""],
    TEXT: [".txt", ".TXT", "", ".3"],
    TABLE: [".parquet", ""],
}


@dataclass(frozen=True)
class File:
    folder: str
    layout: str
    ending: str
    compression: str
    newline: str
    mark: bool  # a byte order mark
    members: int  # of the compressed file
    texts: list[str | None]
    blank: str  # what stands in the blank lines
    rows: int  # in a row group


words = st.lists(st.sampled_from([*LETTERS, "ab", "abc", "Abcd", "bad"]), min_size=1, max_size=4).map("".join)
lines = st.builds(
    lambda some, space: space.join(some), st.lists(words, min_size=1, max_size=4), st.sampled_from(SPACES)
)
texts = st.one_of(
    st.builds(lambda some, end: end.join(some), st.lists(lines, max_size=3), st.sampled_from(["\n", "\r\n", "\r"])),
    st.none(),
    st.sampled_from(["", " ", "\u3000\n", "\x85"]),
)
files = st.sampled_from(list(ENDINGS)).flatmap(
    lambda layout: st.builds(
        File,
        folder=st.sampled_from(["", "a", "a/b", "b", "b/a.txt"]),
        layout=st.just(layout),
        ending=st.sampled_from(ENDINGS[layout]),
        compression=st.just("") if layout == TABLE else st.sampled_from(list(COMPRESSIONS)),
        newline=st.sampled_from(["\n", "\r\n", "\r"]),
        mark=st.booleans(),
        members=st.integers(1, 3),
        texts=st.just([]) | st.lists(texts, min_size=3, max_size=9),
        blank=st.sampled_from(BLANKS),
        rows=st.integers(1, 4),
    )
)
OTHER_ENCODINGS = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"]
OTHERS = [(name, encoding) for name in ("z.txt", "a.jsonl") for encoding in OTHER_ENCODINGS]
others = st.sampled_from([None] * 7 * len(OTHERS) + OTHERS)  # one folder in eight


def content(file: File) -> bytes:
    records = [{"id": number, "text": text} for number, text in enumerate(file.texts)]
    if file.layout == LINES:
        text = "".join(json.dumps(record, ensure_ascii=number % 2 == 0) + "\n" for number, record in enumerate(records))
        text = text.replace("\n", f"\n{file.blank}\n", file.rows - 1)
    elif file.layout == ARRAY:
        text = json.dumps(records, indent=None if file.rows == 1 else file.rows)
    elif file.layout == PRETTY:
        text = "\n".join(json.dumps(record, indent=file.rows, ensure_ascii=False) for record in records)
    else:
        text = f"\n{file.blank}\n".join(re.sub(r"\r\n?", "\n", text or "") for text in file.texts)
    text = text.replace("\n", file.newline)
    if file.layout != TEXT:
        text += file.newline * (file.rows - 1)
    return text.encode("utf-8-sig" if file.mark else "utf-8")


def write(root: Path, number: int, file: File) -> Path:
    path = root / file.folder / f"{number:02d}{file.ending}{file.compression}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.layout == TABLE:
        pq.write_table(pa.table({"text": pa.array(file.texts, pa.string())}), path, row_group_size=file.rows)
        return path
    data, step = content(file), 1 + len(content(file)) // file.members
    compress = COMPRESSIONS[file.compression]
    path.write_bytes(b"".join(compress(data[start : start + step]) for start in range(0, max(len(data), 1), step)))
    return path


def read_independently(path: Path, file: File) -> list[str]:
    """The documents of a file, by the standard library's and pyarrow's readers, whole and in memory."""
    if file.layout == TABLE:
        found = pq.read_table(path).column("text").to_pylist()
    else:
        data = path.read_bytes()
        if file.compression == ".zst":
            data = pa.input_stream(pa.py_buffer(data), compression="zstd").read()
        elif file.compression:
            data = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[file.compression.lower()].decompress(data)
        text = data.decode("utf-8-sig")
        if file.layout == TEXT:
            found = ["".join(lines) for lines in paragraphs(re.sub(r"\r\n?", "\n", text).split("\n"))]
        elif file.layout == ARRAY:
            found = [record["text"] for record in json.loads(text)]
        elif file.layout == LINES:
            found = [json.loads(line)["text"] for line in re.split("\r\n|\r|\n", text) if line.strip()]
        else:
            with_commas = re.sub(r"\}(?=[\r\n]+\{)", "},", text)
            found = [record["text"] for record in json.loads(f"[{with_commas}]")]
    return [document for document in found if document and document.strip()]


def paragraphs(lines: list[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(f"{line}\n")
        elif found[-1]:
            found.append([])
    return found


def tokenised(paths: list[str], part_bytes: int, folder: Path, wordpiece) -> list[list[int]]:
    """The documents' ids as the workers write them, part by part."""
    found = []
    for part_input in cut_into_parts(find_inputs(paths).sources, "text", part_bytes):
        path = str(folder / part_input.name)
        write_part(part_input, path, wordpiece, "text")
        part = read_part(path, np.uint16)
        data = Path(path).read_bytes()
        tokens = np.frombuffer(data, np.uint16, part.num_tokens)
        lengths = np.frombuffer(data, np.int64, part.num_documents, offset=2 * part.num_tokens)
        assert lengths.sum() == part.num_tokens
        found += [ids.tolist() for ids in np.split(tokens, np.cumsum(lengths)[:-1])][: part.num_documents]
    return found


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return load_wordpiece(str(path)), BertTokenizerFast(vocab=str(path))


def check(tokenizers, some: list[File], first: int, part_bytes: int, other: tuple[str, str] | None) -> None:
    wordpiece, bert = tokenizers
    with tempfile.TemporaryDirectory() as temporary:
        root, parts = Path(temporary, "corpus"), Path(temporary, "parts")
        root.mkdir()
        parts.mkdir()
        written = {str(write(root, number, file)): file for number, file in enumerate(some)}
        for noise in (".hidden.txt", ".git/x.jsonl", "README.md", "_SUCCESS", "logo.png"):
            (root / noise).parent.mkdir(exist_ok=True)
            (root / noise).write_bytes(b"" if noise == "_SUCCESS" else b"\x89PNG\0 not a document \xff")
        paths = [str(root)]
        order = sorted(written)
        if first < len(order):  # one file is named before the folder and reached by a link in it too
            paths.insert(0, order[first])
            (root / "b").mkdir(exist_ok=True)
            (root / "b/link.txt").symlink_to(order[first])
            order.insert(0, order.pop(first))
        if other is not None:
            text = json.dumps({"text": "café été"}, ensure_ascii=False)
            (root / other[0]).write_bytes(text.encode(other[1]))
            with pytest.raises(UserError, match=rf"^{re.escape(str(root / other[0]))}: .*UTF-8"):
                tokenised(paths, part_bytes, parts, wordpiece)
            return
        documents = [text for path in order for text in read_independently(Path(path), written[path])]
        expected = [ids for ids in bert(documents, add_special_tokens=False)["input_ids"] if ids] if documents else []
        if not any(Path(path).stat().st_size for path in order):
            with pytest.raises(UserError, match=r"holds no file with text in it|the file is empty"):
                find_inputs(paths)
            return
        assert tokenised(paths, part_bytes, parts, wordpiece) == expected


CASES = {
    "some": st.lists(files, min_size=2, max_size=6),
    "first": st.integers(0, 9),
    "part_bytes": st.sampled_from([1, 100, 10**6]),
    "other": others,
}


@given(**CASES)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_random_files_give_the_ids_of_an_independent_reader(tokenizers, some, first, part_bytes, other):
    check(tokenizers, some, first, part_bytes, other)


@pytest.mark.slow
@given(**CASES)
@settings(max_examples=500, deadline=None, derandomize=True, database=None)
def test_five_hundred_random_folders_give_the_ids_of_an_independent_reader(tokenizers, some, first, part_bytes, other):
    check(tokenizers, some, first, part_bytes, other)
