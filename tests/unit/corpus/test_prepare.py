import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from corpus_files import TOOL, contents, copy_pair, run_tool, tokens_of
from peer_scale.corpus.manifest import PairManifest
from peer_scale.corpus.prepare import bytes_per_part, open_corpus, preprocess, train_on_inputs
from peer_scale.corpus.readers import find_sources, iter_documents
from peer_scale.corpus.store import TokenStore
from peer_scale.corpus.wordpiece import load_wordpiece, train_wordpiece
from peer_scale.corpus.worker_pool import worker_pool
from peer_scale.errors import UserError

pytestmark = pytest.mark.heavy


def digest(*texts: str) -> str:
    """What prepared corpora are known by: the sha256 of texts, each after its length in 8 bytes."""
    encoded = [text.encode() for text in texts]
    return hashlib.sha256(b"".join(len(text).to_bytes(8, "little") + text for text in encoded)).hexdigest()


def identities(folder: Path) -> list[str]:
    return [
        f"{path} {path.stat().st_size} {path.stat().st_mtime_ns} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for path in sorted(folder.iterdir())
    ]


def indexed_dataset(prefix: str):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(prefix)


# --- what is written


def test_megatron_reads_the_tokens_that_the_tokenizer_gives(pair, raw, wordpiece):
    documents = list(iter_documents([str(raw)]))
    expected = [ids for ids in wordpiece.encode(documents) if ids]
    dataset = indexed_dataset(pair)
    assert len(documents) == 601
    assert len(dataset) == len(expected) == 600
    assert dataset.document_indices.tolist() == list(range(601))
    assert dataset.index.dtype is np.uint16
    assert [dataset[number].tolist() for number in range(600)] == expected
    store = TokenStore.open([pair])
    assert (store.num_documents, store.num_tokens) == (600, sum(map(len, expected)))
    assert store.document_lengths(0, 600).tolist() == list(map(len, expected))


def test_megatrons_own_builder_writes_the_same_bytes(tmp_path, pair, raw, wordpiece):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "own.bin"), dtype=np.uint16)
    for ids in wordpiece.encode(list(iter_documents([str(raw)]))):
        if ids:
            builder.add_item(torch.tensor(ids))
            builder.end_document()
    builder.finalize(str(tmp_path / "own.idx"))
    assert (tmp_path / "own.bin").read_bytes() == Path(f"{pair}.bin").read_bytes()
    assert (tmp_path / "own.idx").read_bytes() == Path(f"{pair}.idx").read_bytes()


@pytest.mark.parametrize(("workers", "part_bytes"), [(1, 50_000), (1, 1 << 25), (2, 5_000)])
def test_the_bytes_do_not_depend_on_workers_or_parts(tmp_path, pair, raw, wordpiece, workers, part_bytes):
    prefix = str(tmp_path / "corpus")
    preprocess([str(raw)], wordpiece, prefix, workers=workers, part_bytes=part_bytes)
    assert contents(prefix)[:2] == contents(pair)[:2]
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx", "corpus.json", "corpus.tokenizer.json"]


def test_a_small_input_has_parts_for_all_workers(tmp_path):
    for name, size in {"small": 1 << 19, "medium": 1 << 30, "large": 1 << 40}.items():
        with open(tmp_path / f"{name}.txt", "wb") as file:
            file.truncate(size)  # sparse
    sources = [find_sources([str(tmp_path / f"{name}.txt")]) for name in ("small", "medium", "large")]
    assert [bytes_per_part(source, 1 << 25) for source in sources] == [1 << 20, 1 << 22, 1 << 25]
    assert [bytes_per_part(source, 1000) for source in sources] == [1000] * 3
    assert bytes_per_part(find_sources(["builtin"]), 1 << 25) == 1 << 25, "its size is not known"


def test_a_large_vocabulary_is_stored_as_int32(tmp_path, raw, wordpiece):
    tokens = tokens_of(wordpiece)
    (tmp_path / "vocab.txt").write_text("\n".join(f"unused{n}" for n in range(70_000)) + "\n" + "\n".join(tokens))
    large = load_wordpiece(str(tmp_path / "vocab.txt"))
    preprocess([str(raw / "b.jsonl")], large, str(tmp_path / "corpus"))
    expected = large.encode(list(iter_documents([str(raw / "b.jsonl")])))
    dataset = indexed_dataset(str(tmp_path / "corpus"))
    assert dataset.index.dtype is np.int32
    assert dataset[7].tolist() == expected[7]
    assert min(expected[7]) > 65_535


def test_a_document_longer_than_a_batch_is_one_document(tmp_path, wordpiece):
    text = "some words and a few more\n" * 100_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text.replace("\n", " ")}))
    preprocess([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], wordpiece, str(tmp_path / "corpus"), workers=2)
    line = wordpiece.encode(["some words and a few more"])[0]
    store = TokenStore.open([str(tmp_path / "corpus")])
    assert store.document_lengths(0, 2).tolist() == [100_000 * len(line)] * 2
    assert np.array_equal(store.read(1, 0, 100_000 * len(line)), np.tile(line, 100_000))
    assert np.array_equal(store.read(0, 0, 100_000 * len(line)), np.tile(line, 100_000))


def test_the_manifest_describes_the_pair(pair, raw, wordpiece):
    manifest = json.loads(Path(f"{pair}.json").read_text())
    assert manifest["num_documents"] == 600
    assert manifest["num_tokens"] == Path(f"{pair}.bin").stat().st_size // 2
    assert manifest["tokenizer_digest"] == wordpiece.digest
    assert manifest["key"] == digest("text", *identities(raw), wordpiece.digest, "2", "50000")
    assert manifest["fingerprint"] == pickle.loads(pickle.dumps(TokenStore.open([pair])))._pairs[0].fingerprint
    assert manifest["inputs"] == [
        {"path": str(raw), "files": 103, "bytes": sum(path.stat().st_size for path in raw.iterdir())}
    ]


# --- interruptions


@pytest.fixture(scope="module")
def slow_input(tmp_path_factory, text_file) -> Path:
    path = tmp_path_factory.mktemp("slow") / "a.txt"
    path.write_text("\n\n".join([text_file.read_text()] * (6_000_000 // text_file.stat().st_size)))
    return path


@pytest.fixture(scope="module")
def tool_arguments(slow_input, tmp_path_factory, wordpiece) -> list[str]:
    folder = tmp_path_factory.mktemp("tokenizer")
    wordpiece.save(folder)
    return ["--input", str(slow_input), "--tokenizer", str(folder), "--part-megabytes", "0.3", "--workers", "2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tool_arguments) -> list[bytes]:
    prefix = str(tmp_path_factory.mktemp("uninterrupted") / "corpus")
    result = run_tool(*tool_arguments, "--output-prefix", prefix)
    assert (result.returncode, result.stdout) == (0, "")
    assert "documents" in result.stderr
    assert "Traceback" not in result.stderr
    return contents(prefix)


def interrupted_by(number: int, arguments: list[str], prefix: Path) -> tuple[int, str, list[Path]]:
    """Runs the tool until it has finished some parts, then signals it; returns exit code, stderr and the parts."""
    command = [sys.executable, str(TOOL), *arguments, "--output-prefix", str(prefix)]
    # a job in the background of a shell ignores SIGINT and hands that on; a user's tool at a terminal does not
    command = ["env", "--default-signal=INT", *command]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    parts_folder = Path(f"{prefix}.parts")
    while len(list(parts_folder.glob("*/????????"))) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    _, stderr = process.communicate(timeout=10)
    return process.returncode, stderr, sorted(parts_folder.glob("*/????????"))


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT))]
)
def test_an_interrupted_run_leaves_no_process_and_goes_on_to_the_same_bytes(
    tmp_path, tool_arguments, uninterrupted, number
):
    code, stderr, parts = interrupted_by(number, tool_arguments, tmp_path / "corpus")
    assert code == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in stderr
    assert not (tmp_path / "corpus.json").exists()
    assert 4 <= len(parts) < 20
    result = run_tool(*tool_arguments, "--output-prefix", tmp_path / "corpus")
    assert result.returncode == 0
    assert contents(tmp_path / "corpus") == uninterrupted
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx", "corpus.json", "corpus.tokenizer.json"]


def test_workers_end_at_once_when_the_block_raises():
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker_pool(2) as pool:
        assert pool.submit(abs, -1).result() == 1
        pool.submit(time.sleep, 60)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 20


def test_finished_parts_are_reused_but_not_those_of_other_inputs(tmp_path, tool_arguments, uninterrupted, slow_input):
    *_, parts = interrupted_by(signal.SIGKILL, tool_arguments, tmp_path / "corpus")
    shutil.copy(parts[1], parts[0])  # so that reuse shows
    shutil.copytree(tmp_path, tmp_path / "again")
    assert run_tool(*tool_arguments, "--output-prefix", tmp_path / "corpus").returncode == 0
    reused, expected = contents(tmp_path / "corpus")[0], uninterrupted[0]
    assert reused != expected
    assert reused[-len(expected) // 2 :] == expected[-len(expected) // 2 :]
    other = tmp_path / "other.txt"
    shutil.copy(slow_input, other)
    arguments = [str(other) if argument == str(slow_input) else argument for argument in tool_arguments]
    assert run_tool(*arguments, "--output-prefix", tmp_path / "again" / "corpus").returncode == 0
    assert contents(tmp_path / "again" / "corpus")[:2] == uninterrupted[:2]


def test_what_is_finished_is_not_done_again_and_what_is_damaged_is(copy, raw, wordpiece):
    before = contents(copy)
    stamp = os.stat(f"{copy}.bin").st_mtime_ns
    preprocess([str(raw)], wordpiece, copy, part_bytes=50_000)
    assert os.stat(f"{copy}.bin").st_mtime_ns == stamp
    os.truncate(f"{copy}.bin", 100)
    preprocess([str(raw)], wordpiece, copy, part_bytes=50_000)
    assert contents(copy) == before


# --- --data-path


def opened(*data_path: object, tokenizer: str | None = None, cache: object = "/dev/null", vocab_size: int = 500):
    return open_corpus(
        [str(path) for path in data_path],
        tokenizer,
        vocab_size=vocab_size,
        text_key="text",
        cache_dir=Path(str(cache)),
        workers=2,
    )


def test_pairs_are_opened_as_they_are(tmp_path, pair, wordpiece):
    for path in (pair, f"{pair}.bin", f"{pair}.idx"):
        store, found = opened(path)
        assert store.prefixes == (pair,)
        assert found.digest == wordpiece.digest
    other = copy_pair(pair, tmp_path)
    store, found = opened(f"{pair}.bin", other, f"{pair}.idx", pair)
    assert (store.num_documents, store.prefixes) == (1200, (pair, other))
    wordpiece.save(tmp_path / "tokenizer")
    assert opened(pair, tokenizer=str(tmp_path / "tokenizer"))[1].digest == wordpiece.digest


def test_bad_mixtures_of_data_and_tokenizer_are_errors(tmp_path, copy, raw):
    with pytest.raises(UserError, match=r"either prefixes of \.bin/\.idx pairs or raw text, not both"):
        opened(copy, raw)
    train_wordpiece(["other words entirely"], 100).save(tmp_path / "other")
    with pytest.raises(UserError, match="made with another tokenizer than the one given"):
        opened(copy, tokenizer=str(tmp_path / "other"))
    os.unlink(f"{copy}.tokenizer.json")
    with pytest.raises(UserError, match=r"corpus.tokenizer.json: no such file; name the tokenizer .* by --tokenizer"):
        opened(copy)
    os.unlink(f"{copy}.idx")
    for path in (copy, f"{copy}.bin"):
        with pytest.raises(UserError, match=r"corpus.idx: no such file"):
            opened(path)


def test_raw_text_is_tokenised_once_into_the_cache(tmp_path, raw, wordpiece):
    wordpiece.save(tmp_path / "tokenizer")
    cache = tmp_path / "new" / "cache"
    given = str(tmp_path / "tokenizer")
    store, found = opened(raw, tokenizer=given, cache=cache)
    assert (store.num_documents, found.digest) == (600, wordpiece.digest)
    # Later versions must find caches by the same names.
    folder = digest("text", *identities(raw), wordpiece.digest)[:32]
    assert store.prefixes == (str(cache / folder / "corpus"),)
    stamp = os.stat(f"{store.prefixes[0]}.bin").st_mtime_ns
    again, _ = opened(raw, tokenizer=given, cache=cache)
    assert again.fingerprint == store.fingerprint
    assert os.stat(f"{store.prefixes[0]}.bin").st_mtime_ns == stamp
    part, _ = opened(raw / "a.txt", tokenizer=given, cache=cache)
    assert part.num_documents == 300
    trained_store, trained = opened(raw / "a.txt", cache=cache, vocab_size=300)
    assert trained.vocab_size == 300
    (folder,) = (path for path in cache.iterdir() if path.name in trained_store.prefixes[0])
    (identity,) = (identity for identity in identities(raw) if identity.startswith(str(raw / "a.txt")))
    assert folder.name == digest("text", identity, "trained 300")[:32]
    assert trained.digest == train_on_inputs([str(raw / "a.txt")], 300).digest
    assert trained_store.read(0, 0, 5).tolist() == trained.encode([next(iter_documents([str(raw / "a.txt")]))])[0][:5]
    assert len(list(cache.iterdir())) == 3
    os.truncate(f"{store.prefixes[0]}.bin", 10)
    repaired, _ = opened(raw, tokenizer=given, cache=cache)
    assert repaired.fingerprint == store.fingerprint


def test_changed_text_is_tokenised_anew(tmp_path, wordpiece):
    text = tmp_path / "a.txt"
    wordpiece.save(tmp_path / "tokenizer")
    for expected in (["one"], ["one", "two"], ["two", "one"]):
        text.write_text("\n\n".join(expected))
        store, found = opened(text, tokenizer=str(tmp_path / "tokenizer"), cache=tmp_path / "cache")
        lengths = store.document_lengths(0, store.num_documents).tolist()
        assert [store.read(number, 0, n).tolist() for number, n in enumerate(lengths)] == found.encode(expected)


@pytest.mark.slow
def test_several_processes_may_prepare_the_same_text_at_once(tmp_path, raw):
    code = (
        "import sys; from pathlib import Path; from peer_scale.corpus.prepare import open_corpus\n"
        "if __name__ == '__main__':\n"
        "    store, wordpiece = open_corpus(sys.argv[1:2], None, vocab_size=400, text_key='text',\n"
        "                                   cache_dir=Path(sys.argv[2]), workers=1)\n"
        "    print(store.fingerprint, wordpiece.digest)\n"
    )
    command = [sys.executable, "-c", code, str(raw), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(outputs) == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(os.listdir(folder)) == ["corpus.bin", "corpus.idx", "corpus.json", "corpus.tokenizer.json"]


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, raw):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/cache.*: Not a directory"):
        opened(raw, cache=tmp_path / "file" / "cache")


# --- the tool's bad input


def test_outputs_never_overwrite_inputs_or_foreign_files(tmp_path, wordpiece):
    source = tmp_path / "corpus.json"
    source.write_text('{"text": "hello there"}\n')
    with pytest.raises(UserError, match=r"corpus.json: is an input and would be overwritten"):
        preprocess([str(source)], wordpiece, str(tmp_path / "corpus"))
    (tmp_path / "x.bin").write_text("foreign")
    with pytest.raises(UserError, match=r"x.bin: exists and was not made here"):
        preprocess([str(source)], wordpiece, str(tmp_path / "x"))
    assert source.read_text() == '{"text": "hello there"}\n'
    assert sorted(os.listdir(tmp_path)) == ["corpus.json", "x.bin"]


def test_text_that_gives_no_token_is_an_error(tmp_path, wordpiece):
    (tmp_path / "a.txt").write_text("\u200b")
    with pytest.raises(UserError, match=r"a.txt: no document in it"):
        preprocess([str(tmp_path / "a.txt")], wordpiece, str(tmp_path / "corpus"))


BAD_CALLS = [
    ([], "--input is missing"),
    (["--input", "{raw}"], "--output-prefix is missing"),
    (["--input", "{raw}", "--output-prefix", "{out}"], "either --tokenizer or, to train one, --vocab-size"),
    (
        ["--input", "{raw}", "--output-prefix", "{out}", "--tokenizer", "no/such/file"],
        "no/such/file: no such tokenizer",
    ),
    (["--input", "{raw}", "--output-prefix", "{out}", "--vocab-size", "9"], "a vocabulary of 9 is too small"),
    (
        ["--input", "{raw}", "--output-prefix", "{out}", "--vocab-size", "99", "--workers", "0"],
        "--workers is 0; it must be a whole number of at least 1",
    ),
    (
        ["--input", "/no/such.txt", "--output-prefix", "{out}", "--vocab-size", "99"],
        "/no/such.txt: no such file or fold",
    ),
    (
        ["--input", "{raw}", "--text-key", "body", "--output-prefix", "{out}", "--vocab-size", "99"],
        "b.jsonl, line 1: no k",
    ),
    (["--input", "{raw}", "--output-prefix", "/dev/null/x", "--vocab-size", "99"], "/dev/null: File exists"),
    (["--verify", "{out}"], "out.json: no manifest of"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_bad_input_ends_the_tool_with_one_line(tmp_path, raw, arguments, message):
    result = run_tool(*(argument.format(raw=raw, out=tmp_path / "out") for argument in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr


def test_the_tool_trains_and_verifies_from_anywhere(tmp_path, raw):
    done = run_tool("--input", raw / "a.txt", "--vocab-size", 300, "--output-prefix", "out/corpus", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = PairManifest.read(str(tmp_path / "out" / "corpus"))
    assert manifest is not None
    assert (manifest.num_documents, manifest.vocab_size) == (300, 300)
    assert run_tool("--verify", "out/corpus", cwd=tmp_path).returncode == 0
    help_text = run_tool("--help").stdout
    assert "--tokenizer vocab.txt" in help_text
    assert "--output-prefix data/corpus" in help_text
