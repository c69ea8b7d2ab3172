"""Folders of shards: compressed ones, ones without an ending, ones met twice, damaged ones, and those left out."""

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from corpus_files import run_tool
from peer_scale.corpus.formats.hub import load_hub_documents
from peer_scale.corpus.formats.json_values import MAX_RECORD_CHARS, iter_json_values
from peer_scale.corpus.formats.lines import count_lines
from peer_scale.corpus.prepare import preprocess
from peer_scale.corpus.readers import find_inputs, find_sources, iter_documents
from peer_scale.corpus.store import TokenStore
from peer_scale.errors import UserError
from test_readers import documents, read_in_slices, write

pytestmark = pytest.mark.heavy

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    # with a frame to skip, as the parallel compressors write them
    "zst": lambda data: pa.compress(data, codec="zstd", asbytes=True) + b"\x50\x2a\x4d\x18\x02\0\0\0ab",
}


def jsonl(*texts: str | None) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


# --- kinds of files


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_give_their_documents_over_all_members(tmp_path, ending):
    compress = COMPRESS[ending]
    first, second = jsonl("one", "two"), jsonl("three")
    write(tmp_path / f"a.jsonl.{ending}", compress(first[:9]) + compress(first[9:] + second) + compress(b""))
    write(tmp_path / f"b.txt.{ending.upper()}", compress(b"four\r\r") + compress(b"five\r"))
    write(tmp_path / f"c.ndjson.{ending}", compress(b""))
    write(tmp_path / f"part-0.{ending}", compress(jsonl("six")))
    assert documents(str(tmp_path)) == ["one", "two", "three", "four", "five", "six"]
    assert read_in_slices(str(tmp_path / f"a.jsonl.{ending}"), 1) == ["one", "two", "three"]


def test_an_xz_file_may_have_padding_between_its_streams(tmp_path):
    path = write(tmp_path / "a.txt.xz", lzma.compress(b"one\n\n") + b"\0" * 8 + lzma.compress(b"two") + b"\0" * 4)
    assert documents(path) == ["one", "two"]


def test_files_without_an_ending_are_read_by_what_they_hold(tmp_path):
    write(tmp_path / "AA/wiki_00", "\ufeffa page\n\nanother page")
    write(tmp_path / "AA/wiki_01", jsonl("a page in JSON"))
    write(tmp_path / "AA/corpus.00002", '[{"text": "in an array"}]')
    pq.write_table(pa.table({"text": ["in a table"]}), tmp_path / "AA/x")
    write(tmp_path / "AA/y.gz", COMPRESS["gz"]("größer".encode()))
    write(tmp_path / "AA/z", b"\x00\x01binary")
    write(tmp_path / "AA/zz", "größer".encode("latin-1"))
    assert documents(str(tmp_path)) == [
        "in an array",
        "a page",
        "another page",
        "a page in JSON",
        "in a table",
        "größer",
    ]
    folder = tmp_path / "AA"
    assert find_inputs([str(tmp_path)]).notice == (
        f"notice: 2 files left out: 2 of a kind that is not read ({folder}/z, {folder}/zz); "
        f"5 without an ending read by content ({folder}/corpus.00002, {folder}/wiki_00, {folder}/wiki_01 and 2 more)"
    )
    for name in ("z", "zz"):
        with pytest.raises(UserError, match=f"^{folder}/{name}: unknown kind of file; the kinds read are"):
            documents(str(folder / name))


# --- what is left out, and what is met twice


def test_what_a_folder_holds_beside_its_text_is_counted_and_named(tmp_path):
    write(tmp_path / "a.txt", "one")
    for name in ("b.csv", "c.md", "d.arrow", "e.txt.zip", "f.parquet.gz"):
        write(tmp_path / name, "x")
    write(tmp_path / "e.jsonl", "")
    os.mkfifo(tmp_path / "pipe.txt")
    assert documents(str(tmp_path)) == ["one"]
    assert find_inputs([str(tmp_path)]).notice == (
        f"notice: 7 files left out: 6 of a kind that is not read ({tmp_path}/b.csv, {tmp_path}/c.md, "
        f"{tmp_path}/d.arrow and 3 more); 1 empty ({tmp_path}/e.jsonl)"
    )
    assert find_inputs([str(tmp_path / "a.txt")]).notice is None
    with pytest.raises(UserError, match=r"pipe\.txt: a pipe or device; write the text to a file first"):
        documents(str(tmp_path / "pipe.txt"))


def test_a_file_reached_in_several_ways_is_read_once(tmp_path):
    one = write(tmp_path / "data/one.txt", "one")
    write(tmp_path / "data/sub/two.txt", "two")
    (tmp_path / "data/linked.txt").symlink_to(one)
    os.link(one, tmp_path / "data/hard.txt")
    (tmp_path / "data/folder").symlink_to(tmp_path / "data/sub")
    data = str(tmp_path / "data")
    assert documents(data) == ["two", "one"]
    paths = [one, f"{data}/sub/../one.txt", data, f"{data}/sub", one]
    assert documents(*paths) == ["one", "two"]
    found = find_inputs(paths)
    assert [(path, [source.name for source in sources]) for path, sources in found.by_path] == [
        (paths[0], [one]),
        (paths[1], []),
        (data, [f"{data}/folder/two.txt"]),
        (paths[3], []),
        (one, []),
    ]
    assert found.notice == (
        "notice: 7 files left out: 7 reached by another path too, and read once "
        f"({data}/hard.txt, {data}/linked.txt, {one} and 4 more)"
    )
    assert len(find_sources(["builtin", "builtin", "owner/name", "owner/name"])) == 2


def test_of_a_file_and_its_compressed_copy_one_is_read(tmp_path):
    for name, data in [
        ("a.jsonl", jsonl("one")),
        ("b.txt.bz2", bz2.compress(b"two")),
        ("b.txt.gz", gzip.compress(b"2")),
    ]:
        write(tmp_path / name, data)
    write(tmp_path / "a.jsonl.gz", gzip.compress(jsonl("one")))
    assert documents(str(tmp_path)) == ["one", "two"]
    assert find_inputs([str(tmp_path)]).notice == (
        "notice: 2 files left out: 2 beside a file that has the same name but for the compression "
        f"({tmp_path}/a.jsonl.gz, {tmp_path}/b.txt.gz)"
    )


def test_an_empty_file_among_others_trips_nothing(tmp_path):
    paths = [write(tmp_path / "a.txt", "one"), write(tmp_path / "b.txt", ""), write(tmp_path / "c.jsonl", " \n\n")]
    assert documents(*paths) == ["one"]
    assert find_inputs(paths).notice == f"notice: 1 file left out: 1 empty ({paths[1]})"
    for alone, problem in [(paths[1:2], "b.txt: the file is empty"), (paths[1:], "c.jsonl: holds no document")]:
        with pytest.raises(UserError, match=problem):
            documents(*alone)


# --- nothing, white space, line ends, byte order marks: the same everywhere

NOTHING = ["", " ", "\t\n", "\u00a0", "\u3000 \u2003", "\x1c\x1f", "\x85", "\u2028", "\ufeff", "\ufeff \u3000"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet", "hub"])
def test_documents_without_text_are_left_out_of_every_kind_of_file(tmp_path, kind):
    texts = ["\ufeffone", *NOTHING, "two", None, *NOTHING]
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        write(path, "\n\n".join(text or "" for text in texts))
    elif kind in ("jsonl", "hub"):
        write(path.with_suffix(".jsonl"), jsonl(*texts))
        path = path.with_suffix(".jsonl") if kind == "jsonl" else path
    elif kind == "json":
        write(path, json.dumps([{"text": text} for text in texts], indent=1))
    else:
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    read = load_hub_documents(str(tmp_path), None, None, "text") if kind == "hub" else iter_documents([str(path)])
    assert [document.strip("\n") for document in read] == ["one", "two"]


def test_tables_without_rows_or_texts_give_nothing(tmp_path):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "c.parquet")
    assert documents(str(tmp_path)) == ["one"]


@pytest.mark.parametrize("slice_bytes", [1, 2, 3, 5, 8, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_lines_end_in_every_old_way(tmp_path, end, slice_bytes):
    lines = ["one", "", "two", "lines", "", "\u3000", "", "three", "x" * 300_000]
    path = write(tmp_path / "a.txt", end.join(lines))
    expected = ["one", f"two{end}lines", f"three{end}{'x' * 300_000}"]
    assert [document.strip() for document in read_in_slices(path, slice_bytes)] == expected
    records = [b'{"text": "one"}', b"", b'\xef\xbb\xbf{"text": "two"}', b" ", b'{"text": "' + b"x" * 300_000 + b'"}']
    path = write(tmp_path / "a.jsonl", end.encode().join(records))
    assert read_in_slices(path, slice_bytes) == ["one", "two", "x" * 300_000]
    path = write(tmp_path / "b.jsonl", end.encode().join([b'{"text": "one"}', b"", b'{"text": "two"}', b"{"]))
    with pytest.raises(UserError, match=r"b\.jsonl, line 4: not JSON"):
        read_in_slices(path, slice_bytes)


def test_line_ends_on_the_border_of_two_blocks_are_one():
    for block_bytes in (1, 2, 3, 7):
        for end in (b"\n", b"\r", b"\r\n", b"\r\r\n"):
            data = b"a" + end + end + b"b" + end
            assert count_lines(data[i : i + block_bytes] for i in range(0, len(data), block_bytes)) == 3


def test_byte_order_marks_of_files_put_together_are_no_text(tmp_path):
    mark = "\ufeff"
    assert documents(write(tmp_path / "a.txt", f"{mark}\n\none\n\n{mark}two\n{mark}\n{mark}three")) == [
        "one",
        "two",
        "three",
    ]
    assert documents(write(tmp_path / "a.jsonl", mark.encode() + jsonl("one") + mark.encode() + jsonl("two"))) == [
        "one",
        "two",
    ]
    array = mark + json.dumps([{"text": f"{mark}one"}])
    assert documents(write(tmp_path / "a.json", array + mark + array)) == ["one", "one"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_other_encodings_are_refused_by_name(tmp_path, name, encoding):
    data = '{"text": "caf\u00e9"}'.encode(encoding)
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(UserError, match=rf"^{path}: UTF-(16|32).*, not UTF-8; convert the file to UTF-8$"):
        documents(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_file_that_was_not_written_whole_is_named(tmp_path, name):
    data = b"one\n\n" * 100 if ".txt" in name else jsonl(*["one"] * 100)
    zeros = len(data)
    data += b"\0" * 100 + data
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    message = f"{path}: zeros from byte {zeros} on; the file was not written whole"
    with pytest.raises(UserError) as caught:
        documents(path)
    assert str(caught.value) == message


# --- JSON that is not one object per line


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_arrays_and_objects_over_several_lines_are_read(tmp_path, indent, end):
    texts = [
        "one {",
        'two "]',
        "thr\\ee\n\r",
        "\u4e2d\U0001f600",
        *(f"{number} " + "x" * 40_000 for number in range(60)),
    ]
    records = [{"id": [{"a": 1}], "text": text} for text in texts]
    array = json.dumps(records, indent=indent, ensure_ascii=False)
    objects = "\n".join(json.dumps(record, indent=indent or 1) for record in records)
    for name, text in {"a.json": array, "b.jsonl": objects, "c.json": f"[ ]\n{array}\n[]{array}"}.items():
        path = write(tmp_path / name, text.replace("\n", end))
        assert read_in_slices(path, 1000) == texts * (2 if name == "c.json" else 1)
    assert documents(write(tmp_path / "d.json.zst", COMPRESS["zst"](array.encode()))) == [
        text.strip() for text in texts
    ]


BAD_JSON = [
    ('[{"text": "a"},\n {"text": "b"}', "line 2: the file ends inside an array; is it whole?"),
    ('[{"text": "a"},\n', "line 2: the file ends inside an array"),
    ('[{"text": "a"}\n{"text": "b"}]', r"line 2: not JSON \(a comma is missing\)"),
    ('[\n{"text": "a"}, ]', r"line 2: not JSON \(Expecting value\)"),
    ('{\n"text": "a",\r\n"b": 1\r}\r{\n"body": 1}', r"line 5: no key 'text'; its keys are body"),
    ('{\n"text": "a"', r"line 1: not JSON \(Expecting ',' delimiter\)"),
    ('{\n"text": ["a"]}', "line 1: the value of 'text' is a list, not a string"),
    ('{"text": "a"\n{"text": "b"}\n', r"line 1: not JSON \(Expecting ',' delimiter\)"),
    ('{"text": "a\n{"text": "b"}\n', r"line 1: not JSON \(.*\); every line must be"),
    ('{"text": ' + "[" * 100_000, r"line 1: not JSON \(maximum recursion depth"),
    (b'[{"text": "a"},\n {"text": "b\xff"}]', "not UTF-8 at byte 28;"),
    (b'[{"text": "a"},\n {"text": "\xe4', "not UTF-8 at byte 27;"),
]


@pytest.mark.parametrize(("content", "message"), BAD_JSON)
def test_bad_json_is_named_with_its_line(tmp_path, content, message):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=message) as caught:
        documents(path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_a_lost_quote_does_not_bring_a_whole_file_into_memory():
    taken = 0

    def chunks():
        nonlocal taken
        yield '{\n"text": "'
        for _ in range(1000):
            taken += 1
            yield "x" * (1 << 20)

    with pytest.raises(UserError, match="line 1 not JSON"):
        list(iter_json_values(chunks(), lambda line, problem: UserError(f"line {line} {problem}")))
    assert taken <= MAX_RECORD_CHARS // (1 << 20) + 1


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.txt.zst", "a.txt.xz"])
def test_memory_does_not_grow_with_a_file_that_cannot_be_cut(tmp_path, name):
    text = "a sentence of some words. " * 100
    if ".txt" in name:
        data = f"{text}\n\n".encode() * 8000
    elif name == "a.json":
        data = json.dumps([{"text": text}] * 8000, indent=1).encode()
    else:
        data = jsonl(text) * 8000
    path = write(tmp_path / name, COMPRESS.get(name.split(".")[-1], bytes)(data))
    tracemalloc.start()
    assert sum(1 for _ in iter_documents([path])) == 8000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) > 20e6
    assert peak < 12e6  # .xz takes 8 MiB for its dictionary


# --- damage


def damaged(folder: Path, kind: str) -> tuple[str, str]:
    """One damaged shard among whole ones; its path and what is said of it."""
    for number in range(4):
        write(folder / f"{number}.jsonl", jsonl(*["text"] * 50))
    path = folder / f"2-bad.{kind}"
    body = jsonl(*(f"document {number} {hash(str(number))}" for number in range(2000)))
    if kind in ("txt", "json"):
        write(path, {"txt": b"one\n\ntwo \xff\n\nthree", "json": b'[{"text": "one"}, {"text": "t\xff"}]'}[kind])
        return str(path), "not UTF-8 at byte "
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["one two"] * 1000}), path, row_group_size=500, compression="snappy")
        group = pq.ParquetFile(path).metadata.row_group(1).column(0)
        data = bytearray(path.read_bytes())
        start = group.dictionary_page_offset or group.data_page_offset
        data[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
        write(path, bytes(data))
        return f"{path}, row group 1", "damaged or cut short "
    whole = COMPRESS[kind.rpartition(".")[2]](body)
    if kind.startswith("second-member"):
        write(path, whole + b"XX" + whole[2:])
    else:
        write(path, whole[: len(whole) // 2])
    return str(path), "damaged, cut short, or not of the kind that its name says "


DAMAGES = ["txt", "json", "parquet", *(f"jsonl.{ending}" for ending in COMPRESS)]
DAMAGES += [f"second-member.jsonl.{ending}" for ending in COMPRESS]


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_shard_of_many_is_named(tmp_path, kind):
    path, problem = damaged(tmp_path, kind)
    with pytest.raises(UserError) as caught:
        documents(str(tmp_path))
    assert str(caught.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl.gz", "parquet"])
def test_a_shard_that_a_worker_finds_damaged_is_named_by_the_tool(tmp_path, wordpiece, kind):
    path, problem = damaged(tmp_path / "data", kind)
    wordpiece.save(tmp_path / "tokenizer")
    arguments = ["--input", tmp_path / "data", "--tokenizer", tmp_path / "tokenizer", "--workers", "1"]
    result = run_tool(*arguments, "--output-prefix", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {path}: {problem}")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_a_damaged_file_of_a_data_set_is_named(tmp_path, kind):
    path, _ = damaged(tmp_path, kind)
    for whole in tmp_path.glob("?.jsonl"):
        whole.unlink()
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["one"] * 3}), tmp_path / "1.parquet")
    else:
        write(tmp_path / "1.jsonl.gz", gzip.compress(jsonl("one", "one", "one")))
    with pytest.raises(UserError) as caught:
        list(load_hub_documents(str(tmp_path), None, None, "text"))
    file = path.removesuffix(", row group 1")
    assert re.fullmatch(
        rf"{tmp_path}, .*{file}: .* train split cannot be read on after row 3 \(.*\)", str(caught.value)
    )


def test_a_worker_that_is_killed_names_what_it_was_reading(tmp_path, wordpiece):
    path = write(tmp_path / "a.txt", "one")
    wordpiece.save(tmp_path / "tokenizer")
    code = (
        "import os, sys, peer_scale.corpus.wordpiece as w; from peer_scale.corpus.prepare import preprocess\n"
        "class Deadly(w.WordPiece):\n"
        "    def encode(self, texts): os.kill(os.getpid(), 9)\n"
        "    def __reduce__(self): return Deadly.load, (sys.argv[2],)\n"
        "    @classmethod\n"
        "    def load(cls, path): return cls(**vars(w.load_wordpiece(path)))\n"
        "if __name__ == '__main__':\n"
        "    try: preprocess([sys.argv[1]], Deadly.load(sys.argv[2]), sys.argv[3])\n"
        "    except ValueError as error: print(error)\n"
    )
    script = write(tmp_path / "deadly.py", code)
    command = [sys.executable, script, path, str(tmp_path / "tokenizer"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"{path}: a worker process was killed while it read this (out of memory? use fewer workers)\n"


def test_a_vanished_shard_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a.txt: No such file or directory$"):
        documents(str(tmp_path))


# --- changed files


def rewrite(path: Path, offset: int, data: bytes) -> None:
    """Write over a part of a file and set its times back."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_a_file_that_changed_under_the_same_size_and_time_is_prepared_anew(tmp_path, wordpiece):
    path, prefix = Path(write(tmp_path / "a.txt", "one two\n\nthree")), str(tmp_path / "out")
    for text in ("one two", "two one"):
        rewrite(path, 0, text.encode())
        preprocess([str(path)], wordpiece, prefix)
        expected = wordpiece.encode([text, "three"])
        store = TokenStore.open([prefix])
        assert [store.read(number, 0, len(ids)).tolist() for number, ids in enumerate(expected)] == expected


def test_a_change_of_a_large_file_is_noticed_where_it_is_sampled(tmp_path):
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading it through would take an hour
    (source,) = find_sources([str(path)])
    identities = [source.identity()]
    for offset in (0, (1 << 40) - 1, (1 << 39), (1 << 40) // 255 * 100):
        rewrite(path, offset, b"x")
        identities.append(source.identity())
    path.touch()
    identities.append(source.identity())
    assert len({identity for (identity,) in identities}) == len(identities) - 1  # the middle lies between samples
    assert source.identity(100_000) == source.identity(100_000) != source.identity()


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path, wordpiece):
    class Appending(type(wordpiece)):
        def __reduce__(self):  # called when the first part goes to a worker
            with path.open("a") as file:
                file.write("and on")
            return super().__reduce__()

    path = Path(write(tmp_path / "a.txt", "one"))
    with pytest.raises(UserError, match=rf"^{path}: changed while it was read; start again when nothing writes to it"):
        preprocess([str(path)], Appending(**vars(wordpiece)), str(tmp_path / "out"))
    assert not (tmp_path / "out.json").exists()


def test_the_tool_gives_its_notice_once_and_the_same_bytes_for_any_workers(tmp_path, wordpiece):
    data = tmp_path / "data"
    for number, ending in enumerate(COMPRESS):
        write(data / f"{number}.jsonl.{ending}", COMPRESS[ending](jsonl(*(f"text {i} of {ending}" for i in range(50)))))
    write(data / "README.md", "x")
    wordpiece.save(tmp_path / "tokenizer")
    for workers, part in ((1, "10"), (2, "0.000001")):
        arguments = [
            "--input",
            data,
            "--tokenizer",
            tmp_path / "tokenizer",
            "--output-prefix",
            tmp_path / f"out{workers}",
        ]
        result = run_tool(*arguments, "--workers", workers, "--part-megabytes", part)
        assert result.returncode == 0
        lines = [line for line in result.stderr.splitlines() if line.startswith("notice: ")]
        assert lines == [f"notice: 1 file left out: 1 of a kind that is not read ({data}/README.md)"]
    assert (tmp_path / "out1.bin").read_bytes() == (tmp_path / "out2.bin").read_bytes()
    assert (tmp_path / "out1.idx").read_bytes() == (tmp_path / "out2.idx").read_bytes()
    assert TokenStore.open([str(tmp_path / "out1")]).num_documents == 200
