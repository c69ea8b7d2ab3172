"""Files with a few bytes changed: refused in one line, or read as the very same content; never otherwise."""

import hashlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from checkpoint_runs import WHOLE, write_random
from peer_scale.checkpoints.manifest import MANIFEST
from peer_scale.checkpoints.reader import read_checkpoint
from peer_scale.corpus.manifest import PairManifest
from peer_scale.corpus.prepare import open_corpus
from peer_scale.corpus.store import TokenStore, pair_fingerprint
from peer_scale.corpus.wordpiece import load_wordpiece, train_wordpiece
from peer_scale.errors import UserError
from peer_scale.settings.ds_config import read_ds_config
from token_files import write_pair

NUMBERS = [12, pytest.param(400, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(["the quick brown fox jumps over the lazy dog " * 20, "pack my box"], 200)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, wordpiece):
    folder = tmp_path_factory.mktemp("saved")
    write_random(folder, replace(WHOLE.model, vocab_size=wordpiece.vocab_size), WHOLE.objective, "ranker", wordpiece)
    return folder / "step_00000000"


@pytest.fixture(scope="module")
def pair(tmp_path_factory, wordpiece):
    """A pair as `peer-scale data` leaves it: with a manifest and the tokenizer that made it."""
    folder, rng = tmp_path_factory.mktemp("pair"), np.random.default_rng(0)
    prefix = write_pair(folder / "pair", [rng.integers(5, 60, int(rng.integers(3, 40))) for _ in range(50)], np.uint16)
    (folder / "pair.tokenizer.json").write_text(wordpiece.to_json())
    index, tokens = ((folder / f"pair.{ending}").read_bytes() for ending in ("idx", "bin"))
    PairManifest(
        *("key", wordpiece.digest, wordpiece.vocab_size, 50, len(tokens) // 2),
        *(len(tokens), hashlib.sha256(tokens).hexdigest(), len(index), hashlib.sha256(index).hexdigest()),
        fingerprint=pair_fingerprint(prefix),
        inputs=(),
    ).write(prefix)
    return folder / "pair"


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Change, cut out, double or insert some bytes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(changed))
        match rng.randrange(6):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                changed[at] ^= 1 << rng.randrange(8)
            case 2:
                del changed[at : at + rng.randint(1, 40)]
            case 3:
                changed[at:at] = changed[at : at + rng.randint(1, 40)]
            case 4:
                changed[at:at] = rng.choice([b"-1", b"9" * 30, b"null", b"[" * 5000, b"1e999", b'"\x1b[2J\n"'])
            case 5:  # another number, in what remains well-formed
                digits = [place for place, byte in enumerate(changed) if chr(byte) in "0123456789"]
                if digits:
                    changed[rng.choice(digits)] = rng.choice(b"123456789")
        if not changed:
            return b""
    return bytes(changed)


def refusals(path, read, number):
    """Count how many mutations of a file are refused; all others must be read as what the file says unchanged.

    `read` gives what was read, None where any content is as good as another.
    """
    original, expected, refused = path.read_bytes(), read(), 0
    try:
        for seed in range(number):
            path.write_bytes(mutated(original, random.Random(seed)))
            try:
                found = read()
            except UserError as error:
                refused += 1
                assert str(error).isprintable()
            except BaseException as error:
                raise AssertionError(f"seed {seed} of {path.name}") from error
            else:
                assert found == expected, f"seed {seed} of {path.name} is read as something else"
    finally:
        path.write_bytes(original)
    return refused


def content_of_checkpoint(folder):
    read = read_checkpoint(folder)
    weights = {name: hashlib.sha256(read.weights[name].numpy().tobytes()).hexdigest() for name in read.weights}
    return read.sections.as_json(), weights, read.tokenizer.digest


def content_of_pair(prefix):
    store, tokenizer = open_corpus(
        [str(prefix)], None, vocab_size=0, text_key="text", cache_dir=prefix.parent / "cache", workers=1
    )
    return all_tokens(store), tokenizer.digest


def all_tokens(store):
    lengths = store.document_lengths(0, store.num_documents)
    return [store.read(number, 0, int(length)).tolist() for number, length in enumerate(lengths)]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("pattern", [MANIFEST, "*.safetensors", "tokenizer/tokenizer.json"])
def test_of_a_checkpoint(checkpoint, pattern, number):
    (path,) = checkpoint.glob(pattern)
    assert refusals(path, lambda: content_of_checkpoint(checkpoint), number) >= 0.8 * number


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("ending", ["idx", "bin", "tokenizer.json"])
def test_of_a_pair_with_a_manifest(pair, ending, number):
    path = pair.with_name(f"pair.{ending}")
    assert refusals(path, lambda: content_of_pair(pair), number) >= 0.8 * number


@pytest.mark.parametrize("number", NUMBERS)
def test_of_a_pairs_manifest(pair, number):
    refusals(pair.with_name("pair.json"), lambda: content_of_pair(pair), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_of_what_nothing_says_how_it_was(tmp_path, wordpiece, number):
    """Another tokenizer, index or ds_config may be what somebody means: read or refused, but never a traceback."""
    wordpiece.save(tmp_path)
    refusals(tmp_path / "tokenizer.json", lambda: load_wordpiece(str(tmp_path)) and None, number)
    rng = np.random.default_rng(0)
    prefix = write_pair(tmp_path / "pair", [rng.integers(5, 100, int(rng.integers(3, 40))) for _ in range(50)])
    refusals(tmp_path / "pair.idx", lambda: all_tokens(TokenStore.open([prefix])) and None, number)
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}, "bf16": {"enabled": True}})
    )
    refusals(ds_config, lambda: read_ds_config(ds_config) and None, number)
