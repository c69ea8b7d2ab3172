"""A table of what strangers may hand over: each ends a command with exit code 2 and one line, soon and in bounds."""

import hashlib
import json
import os
import pickle
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoint_runs import WHOLE, write_manifest, write_random
from peer_scale.checkpoints.manifest import MANIFEST
from peer_scale.cli import main
from peer_scale.corpus.wordpiece import train_wordpiece
from token_files import HEADER, write_index, write_pair

SECONDS, MEMORY = 5.0, 10**9
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 6000  # more than Python makes a number of
CASES: dict[str, Callable[[Path], list]] = {}


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the block takes too long or, at any time, too much memory."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = status("VmRSS"), time.monotonic()
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(12)
    try:
        yield
    finally:
        signal.alarm(0)
    assert time.monotonic() - began < SECONDS
    assert status("VmHWM") - before < MEMORY


def _too_slow(*_):
    raise AssertionError("it does not end")


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with a tokenizer, a checkpoint and a text, all of them good, for cases to spoil a copy of."""
    folder = tmp_path_factory.mktemp("given")
    wordpiece = train_wordpiece(["the quick brown fox jumps over the lazy dog " * 20, "pack my box"], 200)
    wordpiece.save(folder / "tokenizer")
    model = replace(WHOLE.model, vocab_size=wordpiece.vocab_size)
    write_random(folder / "saved", model, WHOLE.objective, "ranker", wordpiece)
    (folder / "good.txt").write_text("the quick brown fox\n")
    return folder


@pytest.fixture
def folder(given, tmp_path) -> Path:
    """Links to what is given, but for what a case makes itself."""
    for path in given.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def case(function: Callable[[Path], list]) -> Callable[[Path], list]:
    CASES[function.__name__.replace("_", " ")] = function
    return function


def cases(names_and_values: dict) -> Callable:
    """Make a case of each value, which the function is given as its second argument."""

    def add(function: Callable[[Path, object], list]) -> Callable:
        for name, value in names_and_values.items():
            CASES[f"{function.__name__.replace('_', ' ')}: {name}"] = lambda folder, value=value: function(
                folder, value
            )
        return function

    return add


def write(path: Path, content: str | bytes | dict) -> Path:
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


@cases(
    {
        "nested": '{"zero_optimization": ' + DEEP + "}",
        "not UTF-8": b'{"fp16": "\xff\xfe"}',
        "a number of 6000 digits": '{"train_batch_size": ' + DIGITS + "}",
        "infinite": '{"gradient_clipping": 1e999}',
        "NaN": '{"gradient_clipping": NaN}',
        "null": "null",
        "an escape sequence": {"\x1b[2J\nerror: all is well": 1},
        "a key twice": '{"fp16": {"enabled": false}, "fp16": {"enabled": true}}',
        "another type": {"zero_optimization": [2], "bf16": "yes"},
        "a huge batch": {"train_batch_size": 2**70},
        "no bytes": "",
        "zeros": bytes(1000),
    }
)
def ds_config(folder, content):
    return ["train", "--deepspeed_config", write(folder / "ds.json", content)]


@cases(
    {
        "nested": "seed: " + DEEP,
        "a Python object": "seed: !!python/object/apply:os.system ['touch ran']",
        "a circle": "model: &a {generator: *a}",
        "a number of 6000 digits": "seed: " + DIGITS,
        "no date": "seed: 2020-99-99",
        "a key that is a list": "? [a, b]\n: 1",
        "an unknown tag": "seed: !evil 1",
        "NUL": "seed: \0",
        "binary": "seed: !!binary '@@@'",
        "a timestamp": "seed: !!timestamp x",
        "merged": "model: {<<: 3}",
        "not UTF-8": b"seed: \xff",
        "aliases": "\n".join(["a: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]),
    }
)
def yaml(folder, content):
    return ["train", "--config", write(folder / "run.yaml", content)]


def preparation(folder, path, tokenizer=None):
    command = ["data", "--input", path, "--tokenizer", tokenizer or folder / "tokenizer", "--workers", 1]
    return [*command, "--output-prefix", folder / "out"]


@cases(
    {
        "nested": '{"text": ' + DEEP + "}\n",
        "a number of 6000 digits": '{"text": "a", "n": ' + DIGITS + "}\n",
        "an escape sequence for a key": '{"\\u001b[2J\\nerror: all is well": 1}\n',
        "text that is no text": '{"text": {"a": 1}}\n',
        "not UTF-8": b'{"text": "\xff\xfe"}\n',
    }
)
def lines_of_json(folder, content):
    return preparation(folder, write(folder / "text.jsonl", content))


PACKED = {
    "rubbish.parquet": b"PAR1" + bytes(range(256)) * 4 + b"PAR1",
    "footer.parquet": b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "text.txt.gz": b"\x1f\x8b\x08\0rubbish",
    "text.txt.xz": b"\xfd7zXZ\0rubbish" * 9,
    "text.txt.zst": b"\x28\xb5\x2f\xfd" + b"\xff" * 40,
}


@cases({name: name for name in PACKED})
def packed(folder, name):
    return preparation(folder, write(folder / name, PACKED[name]))


def spoiled_vocabulary(content: dict, **ids: object) -> None:
    content["model"]["vocab"].update(ids)


@cases(
    {
        "an id below 0": lambda content: spoiled_vocabulary(content, huge=-1),
        "an id of 2**63": lambda content: spoiled_vocabulary(content, huge=2**63),
        "an id that is text": lambda content: spoiled_vocabulary(content, huge="1"),
        "an id twice": lambda content: spoiled_vocabulary(content, huge=7),
        "a list for a vocabulary": lambda content: content["model"].update(vocab=["a", "b"]),
        "another model": lambda content: content["model"].update(type="BPE"),
        "a normalizer that nobody knows": lambda content: content.update(normalizer={"type": "Evil"}),
        "an added token far away": lambda content: content["added_tokens"].append(
            {**content["added_tokens"][0], "id": 2**31, "content": "[FAR]"}
        ),
        "no mask token": lambda content: (content["model"]["vocab"].pop("[MASK]"), content.update(added_tokens=[])),
        "null": lambda content: content.update(model=None),
    }
)
def tokenizer(folder, spoil):
    content = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    spoil(content)
    return preparation(folder, folder / "good.txt", write(folder / "tokenizer.json", content))


@cases({"NUL": b"[PAD]\n\0\n", "not UTF-8": b"[PAD]\n\xff\n", "nothing": b""})
def vocabulary(folder, content):
    return preparation(folder, folder / "good.txt", write(folder / "vocab.txt", content))


@case
def a_tokenizer_that_is_a_pipe(folder):
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "tokenizer.json")
    return preparation(folder, folder / "good.txt", folder / "pipes")


@case
def a_text_that_is_a_pipe(folder):
    os.mkfifo(folder / "pipe.txt")
    return preparation(folder, folder / "pipe.txt")


def planned(folder, prefix):
    return ["plan", "--model", "bert-tiny", "--data-path", prefix, "--tokenizer", folder / "tokenizer"]


@cases(
    {
        "of 2**60 sequences": HEADER.pack(b"MMIDIDX\0\0", 1, 8, 2**60, 2**60 + 1),
        "of floats": HEADER.pack(b"MMIDIDX\0\0", 1, 6, 1, 2) + bytes(28),
        "of version 7": HEADER.pack(b"MMIDIDX\0\0", 7, 8, 1, 2) + bytes(28),
        "of nothing": HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8),
        "of no bytes": b"",
        "of zeros": bytes(200),
    }
)
def index(folder, content):
    write(folder / "pair.bin", bytes(100))
    write(folder / "pair.idx", content)
    return planned(folder, folder / "pair")


@case
def an_index_of_negative_lengths(folder):
    write_pair(folder / "pair", [np.arange(5, 20), np.arange(5, 20)], np.uint16)
    write_index(folder / "pair.idx", np.array([-5, 35]), np.uint16)
    return planned(folder, folder / "pair")


@case
def a_pair_whose_manifest_says_otherwise(folder):
    write_pair(folder / "pair", [np.arange(5, 20)], np.uint16)
    write(folder / "pair.json", {"format": "peer_scale tokens", "version": 1, "key": DIGITS[:4000] * 9})
    return planned(folder, folder / "pair")


SIZES = {"model_type": "electra", "vocab_size": 200, "hidden_size": 8, "embedding_size": 8, "intermediate_size": 16}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}


def from_hugging_face(folder, config=SIZES, **files):
    for path in (folder / "tokenizer").iterdir():
        write(_made(folder / "model") / path.name, path.read_bytes())
    write(folder / "model" / "config.json", config)
    for name, content in files.items():
        write(folder / "model" / name.replace("__", "."), content)
    return ["convert", "from-hf", "--discriminator", folder / "model", "--output", folder / "out"]


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def safetensors(header: dict | str, content: bytes = b"", length: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


@cases(
    {
        "a header of 2**62 bytes": safetensors("{}", length=2**62),
        "a nested header": safetensors('{"a": ' + DEEP + "}"),
        "offsets outside": safetensors({"electra.a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}),
        "a shape of 2**60": safetensors(
            {"electra.a": {"dtype": "F32", "shape": [2**60, 16], "data_offsets": [0, 4]}}, bytes(4)
        ),
        "none": safetensors({}),
        "an escape sequence": safetensors(
            {"electra.\x1b[2J\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
        ),
    }
)
def weights(folder, content):
    return from_hugging_face(folder, model__safetensors=content)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@cases({"code": pickle.dumps({"a": Evil()}), "rubbish": b"PK\x03\x04" + bytes(100), "nothing": b""})
def pickled_weights(folder, content):
    return from_hugging_face(folder, pytorch_model__bin=content)


@cases(
    {
        "hidden size of 2**40": {"hidden_size": 2**40},
        "hidden size below 0": {"hidden_size": -8},
        "10**9 layers": {"num_hidden_layers": 10**9},
        "vocabulary of 10**12": {"vocab_size": 10**12},
        "no heads": {"num_attention_heads": 0},
        "positions that are text": {"max_position_embeddings": "many"},
        "an escape sequence": {"hidden_act": "\x1b[2J\nerror: all is well"},
    }
)
def sizes(folder, changes):
    return from_hugging_face(folder, {**SIZES, **changes}, model__safetensors=safetensors({}))


@cases(
    {
        "a header of 2**62 bytes": lambda content: struct.pack("<Q", 2**62) + content[8:],
        "integers for numbers": lambda content: content.replace(b'"F32"', b'"I32"'),
        "shorter tensors": lambda content: shorter_tensors(content),  # noqa: PLW0108 - stands below
        "other names": lambda content: content.replace(b"weight/", b"w\\u001b/").replace(b"        ", b"", 0),
        "no tensors": lambda content: safetensors({}),
    }
)
def tensors_of_a_checkpoint(folder, spoil):
    """The manifest agrees with the file: who made it meant it."""
    step = folder / "own" / "step_00000000"
    step.mkdir(parents=True)
    for path in (folder / "saved" / "step_00000000").iterdir():
        if path.suffix != ".safetensors":
            (step / path.name).symlink_to(path)
            continue
        content = spoil(path.read_bytes())
        write(step / path.name, content)
        entry = [len(content), hashlib.sha256(content).hexdigest()]
    manifest = json.loads((step / MANIFEST).read_text())
    (file,) = (name for name in manifest["files"] if name.endswith(".safetensors"))
    manifest["files"][file] = entry
    (step / MANIFEST).unlink()
    (step / "tokenizer").unlink()
    for path in (folder / "saved" / "step_00000000" / "tokenizer").iterdir():
        write(_made(step / "tokenizer") / path.name, path.read_bytes())
    write_manifest(step / MANIFEST, manifest)
    return ["convert", "to-hf", "--load", step, "--output", folder / "out"]


def shorter_tensors(content: bytes) -> bytes:
    """Say of each tensor that it has one number less."""
    length = struct.unpack("<Q", content[:8])[0]
    header, numbers, end = json.loads(content[8 : 8 + length]), b"", 0
    for tensor in header.values():
        start, stop = tensor["data_offsets"]
        numbers += content[8 + length + start : 8 + length + stop - 4]
        tensor["shape"][0] -= 1
        tensor["data_offsets"] = [end, end := end + stop - 4 - start]
    return safetensors(header, numbers)


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name, folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    command = list(map(str, CASES[name](folder)))
    with bounded():
        assert main(command) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("tokenising")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), lines
    assert not (folder / "ran").exists(), "a stranger's code was run"
    left = [path.name for path in folder.iterdir() if path.name.startswith(("out", "."))]
    assert set(left) <= {"out.parts"}, "which a preparation would go on from"


def test_there_are_forty():
    assert len(CASES) >= 40
