import json
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peer_scale.corpus.formats import builtin
from peer_scale.corpus.formats.base import FileSlice, FileSource, Piece
from peer_scale.corpus.formats.hub import load_hub_documents
from peer_scale.corpus.readers import find_sources, iter_documents
from peer_scale.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def write_jsonl(path: Path, records: list) -> str:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def documents(*paths: str, **options: str) -> list[str]:
    return [document.strip() for document in iter_documents(paths, **options)]


def cut(path: str, slice_bytes: int) -> list[FileSlice]:
    (source,) = find_sources([path])
    assert isinstance(source, FileSource)
    return list(source.slices(slice_bytes))


def read_in_slices(path: str, slice_bytes: int) -> list[str]:
    found, text = [], ""
    for file_slice in cut(path, slice_bytes):
        for piece, ends_document in file_slice.pieces("text"):
            text += piece
            if ends_document:
                found.append(text)
                text = ""
    assert not text
    return found


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\n\ntwo\nlines\n", ["one", "two\nlines"]),
        ("\n\n one line \n \t \n\n\ntwo", ["one line", "two"]),
        ("no blank line\nin this\nfile", ["no blank line\nin this\nfile"]),
        ("first\r\n\r\nsecond\r\n", ["first", "second"]),
        ("x" * (1 << 20) + "\ny", ["x" * (1 << 20) + "\ny"]),
        (b"\xef\xbb\xbfmark\n\nnone", ["mark", "none"]),
    ],
)
def test_text_documents_are_separated_by_blank_lines(tmp_path, content, expected):
    assert documents(write(tmp_path / "a.txt", content)) == expected


@pytest.mark.parametrize("slice_bytes", [1, 7, 64, 1000, 10**6])
def test_slices_hold_every_text_document_once(tmp_path, slice_bytes):
    rng = random.Random(slice_bytes)
    lines = ["", "", " ", "word", "a longer line of text", "größer 中文 \U0001f600"]
    content = "\n".join(rng.choice(lines) for _ in range(400))
    path = write(tmp_path / "a.txt", content)
    expected = [doc for doc in (d.strip("\n ") for d in re.split(r"\n[ ]*(?:\n[ ]*)+", f"\n\n{content}\n\n")) if doc]
    assert [document.strip() for document in read_in_slices(path, slice_bytes)] == expected
    slices = cut(path, slice_bytes)
    assert [later.start for later in slices[1:]] == [earlier.stop for earlier in slices[:-1]]
    assert slices[-1].stop == len(content.encode())


@pytest.mark.parametrize("slice_bytes", [1, 50, 10**6])
def test_slices_hold_every_json_line_once(tmp_path, slice_bytes):
    texts = [f"document {number} " + "x" * (number % 40) for number in range(200)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert read_in_slices(path, slice_bytes) == texts


@pytest.mark.parametrize("unit", ["words with spaces ", "中", "é", "\U0001f600", "line\n"])
def test_a_long_document_comes_in_pieces_that_join_to_it(tmp_path, unit):
    text = "ab" + unit * (2_500_000 // len(unit.encode()))
    path = write(tmp_path / "a.txt", text)
    (whole,) = cut(path, 1 << 30)
    pieces = list(whole.pieces("text"))
    assert len(pieces) > 1
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join(piece for piece, _ in pieces) == text
    if " " in unit or "\n" in unit:
        assert all(piece[-1].isspace() for piece, _ in pieces[:-1])


def test_jsonl_reads_the_named_key_and_skips_empty_lines_and_texts(tmp_path):
    lines = '{"body": "one", "text": 1}\n\n{"body": "  "}\n{"body": "two \\ud83d\\ude00 \\ud83d"}'
    assert documents(write(tmp_path / "a.json", lines), text_key="body") == ["one", "two \U0001f600 ?"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize(("slice_bytes", "num_slices"), [(1, 7), (1500, None), (10**6, 1)])
def test_parquet_is_read_by_row_groups(tmp_path, kind, slice_bytes, num_slices):
    texts = [f"text number {number}" for number in range(50)]
    column = pa.array([*texts, None, " "]).cast(kind)
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"other": list(range(52)), "text": column}), path, row_group_size=8)
    assert documents(path) == texts
    assert read_in_slices(path, slice_bytes) == texts
    found = len(cut(path, slice_bytes))
    assert found == num_slices if num_slices else 1 < found < 7


def test_a_format_that_is_read_from_its_beginning_needs_no_more_than_its_pieces(tmp_path):
    class Backwards(FileSource):
        endings = (".backwards.txt",)

        def pieces(self, start, stop, text_key):
            for line in reversed(Path(self.name).read_text().splitlines()):
                yield Piece(line, True)

    source = Backwards(write(tmp_path / "a.Backwards.TXT", "one\ntwo\nthree\n"))
    assert Backwards.takes(source.name) and not Backwards.takes("a.txt")
    assert list(source.slices(1)) == [FileSlice(source, 0, 14, 14)]
    assert list(source.documents("text")) == ["three", "two", "one"]


def test_folders_are_read_recursively_sorted_and_without_hidden_or_other_files(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a/z.jsonl", '{"text": "first"}')
    write(tmp_path / "c/d/e.TXT", "third")
    write(tmp_path / "c/empty.txt", "")
    for hidden in (".git/x.txt", ".x.txt", "README.md", "c/.cache/y.txt"):
        write(tmp_path / hidden, "not this")
    assert documents(str(tmp_path / "c"), str(tmp_path / "a")) == ["third", "first"]
    (tmp_path / "c/loop").symlink_to(tmp_path)
    assert documents(str(tmp_path)) == ["first", "second", "third"]


@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    line = "a sentence of some words. " * 100
    path = tmp_path / f"a.{ending}"
    with path.open("w") as file:
        for _ in range(8000):
            file.write(line + "\n\n" if ending == "txt" else json.dumps({"text": line}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in iter_documents([str(path)])) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20e6
    assert peak < 4e6


def test_a_data_set_streams_through_the_datasets_library(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": None}, {"text": "two"}])
    assert list(load_hub_documents(str(tmp_path), None, None, "text")) == ["one", "two"]
    with pytest.raises(UserError, match="no column 'body'; its columns are text"):
        list(load_hub_documents(str(tmp_path), None, None, "body"))


BAD_FILES = [
    ("missing.txt", None, "no such file or folder"),
    ("missing/folder/x", None, "no such file or folder"),
    ("a.txt", "", "the file is empty"),
    ("a.txt", "\n \n", "holds no document"),
    ("a.md", "text", r"unknown kind of file; the kinds read are \.txt, \.jsonl, \.ndjson, \.json, \.parquet, text and"),
    ("a.txt", b"caf\xe9 au lait", "not UTF-8 at byte 3"),
    ("a.txt", b"one\n\ntwo\n\n\xff", "not UTF-8 at byte 10"),
    ("a.txt", b"x" * 3_000_000 + b"\xc3", "not UTF-8 at byte 3000000"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', "not UTF-8 at byte 24"),
    ("a.jsonl", '{"text": "a"}\n\n{"text": "b"', r"line 3: not JSON \(.*\); every line must be one JSON object"),
    ("a.jsonl", '{"text": "a"}\n{"body": "b"}', r"line 2: no key 'text'; its keys are body \(--text-key"),
    ("a.jsonl", '{"text": 5}', "line 1: the value of 'text' is a int, not a string"),
    ("a.json", "[1, 2]", "line 1: a JSON int, not an object with the key 'text'"),
    ("a.jsonl", '"text"', "line 1: a JSON str, not an object with the key 'text'"),
    ("a.parquet", "no parquet", "not a parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        documents(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_number_counts_from_the_start_of_the_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 999 + [{"no": "y"}])
    with pytest.raises(UserError, match="line 1000: no key"):
        read_in_slices(path, 100)


def test_bad_parquet_columns_are_named(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"number": [1], "body": ["x"]}), path)
    with pytest.raises(UserError, match="no column 'text'; it has number, body"):
        documents(path)
    with pytest.raises(UserError, match="column 'number' holds int64, not strings"):
        documents(path, text_key="number")


def test_an_empty_folder_is_an_error(tmp_path):
    write(tmp_path / "sub/notes.md", "x")
    with pytest.raises(UserError, match="the folder holds no file with text"):
        documents(str(tmp_path))


def test_a_name_that_is_neither_path_nor_data_set_is_an_error():
    with pytest.raises(UserError, match=r"^no-such-owner/no-such-data-set: neither an existing path nor a data set"):
        documents("no-such-owner/no-such-data-set")


def test_docstrings_become_documents():
    found = list(builtin.extract_documents([Path(json.__file__).parent]))
    assert found == list(builtin.extract_documents([Path(json.__file__).parent]))
    text = "\n".join(found)
    assert "JSON (JavaScript Object Notation)" in text
    assert ">>>" not in text
    assert "import json" not in text
    # loads and load share paragraphs, but every docstring counts once
    assert 3 <= len(found) <= len(list(Path(json.__file__).parent.glob("*.py")))


def test_a_docstring_found_twice_counts_once(tmp_path):
    sentence = "This sentence stands in two of the files here."
    for name in ("a/one.py", "b/two.py", "tests/three.py", "test_four.py"):
        write(tmp_path / name, f'"""{sentence}"""\n')
    write(tmp_path / "c/broken.py", f'"""{sentence} Not parsed."""\ndef (')
    assert list(builtin.extract_documents([tmp_path])) == [sentence]


def test_prose_drops_code_tables_and_markup():
    docstring = """Returns the :class:`~torch.Tensor` that `name` stands for.

    Args:
        name (`str`, *optional*, defaults to `None`): The name of the tensor to look up.
        axis (int): axis

    Example::

        >>> lookup("x")
        a tensor of some kind that is printed here.

    .. code-block:: python

        This is no sentence but code that would look like one.

    ```python
    This is fenced code that would look like a sentence too.
    ```

    - It raises an error when there is no such name.
    """
    assert builtin.prose(docstring).splitlines() == [
        "Returns the torch.Tensor that name stands for.",
        "The name of the tensor to look up.",
        "It raises an error when there is no such name.",
    ]


def test_the_builtin_corpus_is_known_by_the_versions_of_its_packages():
    import torch

    public, *_build = torch.__version__.split("+")  # the package may leave out which build it is, "+cu130"
    identity = builtin.BuiltinCorpus("builtin").identity()
    assert any(re.fullmatch(re.escape(f"torch {public}") + r"(\+\w+)?", part) for part in identity)
