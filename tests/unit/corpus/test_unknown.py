"""What of a text becomes [UNK]: counted as transformers counts it, kept in the manifest, told when it is much."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import BertTokenizerFast

from peer_scale.commands import data
from peer_scale.corpus.manifest import PairManifest, unknown_counts
from peer_scale.corpus.parts import digest_of
from peer_scale.corpus.prepare import preprocess
from peer_scale.corpus.store import verify
from peer_scale.corpus.unknown import UnknownCounts
from peer_scale.corpus.wordpiece import SPECIAL_TOKENS, WordPiece, load_wordpiece

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCAB = [*SPECIAL_TOKENS, *LETTERS, *(f"##{char}" for char in LETTERS), ".", ",", "the", "##ing"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def known(tokenizer_folder) -> WordPiece:
    return load_wordpiece(tokenizer_folder)


def documents(seed: int, unknown: float) -> list[str]:
    """Return documents in which a share of the words is not known: a sign, a script, a length."""
    rng = random.Random(seed)
    others = ["😀", "слово", "wordд", "中", "a" * 101, "é" * 101, "คำ" * 60]
    return [
        " ".join(
            rng.choice(others) if rng.random() < unknown else "".join(rng.choices(LETTERS + ".,", k=rng.randint(1, 9)))
            for _ in range(200)
        )
        for _ in range(40)
    ]


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def counted_by_transformers(folder: str, texts: list[str]) -> tuple[UnknownCounts, int]:
    oracle = BertTokenizerFast.from_pretrained(folder)
    encoded = oracle(texts, add_special_tokens=False, return_offsets_mapping=True)
    total, num_tokens = UnknownCounts(characters=sum(len("".join(text.split())) for text in texts)), 0
    for text, ids, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        tokens = oracle.convert_ids_to_tokens(ids)
        lost = [text[first:last] for token, (first, last) in zip(tokens, offsets, strict=True) if token == "[UNK]"]
        long = [word for word in lost if len(word) > 100 and (word.isascii() or word[0] == "é")]
        total += UnknownCounts(
            words=sum(not token.startswith("##") for token in tokens),
            unknown_words=len(lost),
            unknown_characters=sum(map(len, lost)),
            long_words=len(long),
            long_characters=sum(map(len, long)),
        )
        num_tokens += len(ids)
    return total, num_tokens


@pytest.mark.parametrize(("workers", "part_bytes"), [(1, 1 << 25), (2, 20_000)])
def test_the_manifest_has_the_counts_of_transformers(tmp_path, tokenizer_folder, known, workers, part_bytes):
    texts = [text.replace("คำ" * 60, "คำ") for text in documents(0, 0.1)]  # of which marks are stripped
    prefix = str(tmp_path / "corpus")
    preprocess([write_lines(tmp_path / "a.jsonl", texts)], known, prefix, workers=workers, part_bytes=part_bytes)
    expected, num_tokens = counted_by_transformers(tokenizer_folder, texts)
    manifest = PairManifest.read(prefix)
    assert manifest is not None
    assert (manifest.unknown, manifest.num_tokens) == (expected, num_tokens)
    assert expected.unknown_words > 500
    assert expected.long_words > 50
    written = json.loads(Path(f"{prefix}.json").read_text())["unknown"]
    assert list(written) == [
        *("words", "characters", "unknown_words", "unknown_characters", "long_words", "long_characters")
    ]
    verify(prefix)
    other = str(tmp_path / "other")
    shutil.copytree(tmp_path, tmp_path / "copies")
    replace(manifest, unknown=None).write(other)
    assert "unknown" not in json.loads(Path(f"{other}.json").read_text())
    assert unknown_counts([prefix, prefix]) == expected + expected
    assert unknown_counts([prefix, other]) is None, "an earlier version did not count"
    assert unknown_counts([str(tmp_path / "megatrons")]) is None


def test_the_length_that_counts_is_that_of_the_normalised_word(known):
    # 101 characters of which the marks are stripped, and 50 which come apart into 150.
    _, counts = known.encode_and_count(["ก\u0e34" * 70, "각" * 50, "각" * 33])
    assert (counts.unknown_words, counts.long_words, counts.long_characters) == (3, 1, 150)


def test_a_part_of_an_earlier_version_is_made_anew(tmp_path, known):
    source = write_lines(tmp_path / "a.jsonl", documents(1, 0.1))
    preprocess([source], known, str(tmp_path / "whole"))
    manifest = PairManifest.read(str(tmp_path / "whole"))
    assert manifest is not None
    parts = tmp_path / "corpus.parts" / digest_of(manifest.key, str(1 << 20))[:32]
    parts.mkdir(parents=True)
    (parts / "00000000").write_bytes(bytes(16) + b"PEERPART")  # the end of an empty one
    preprocess([source], known, str(tmp_path / "corpus"))
    assert PairManifest.read(str(tmp_path / "corpus")) == manifest


NOTICES = [
    (UnknownCounts(1000, 5000, 10, 50), 1000, 100, None),
    (UnknownCounts(0, 0, 0, 0), 0, 100, None),
    (
        UnknownCounts(1000, 5000, 11, 50),
        1200,
        100,
        "1 % of the characters and 1.1 % of the words are lost as [UNK], because the vocabulary lacks characters of "
        "theirs; a vocabulary trained on this text, or a larger --vocab-size, keeps more",
    ),
    (
        UnknownCounts(1000, 5000, 2, 400, 1, 300),
        9000,
        100,
        "8 % of the characters and 0.2 % of the words are lost as [UNK], most of them in words of over 100 characters, "
        "as scripts without spaces give them; put spaces between the words, or leave --tokenizer out and have a "
        "vocabulary trained on this text",
    ),
    (
        UnknownCounts(1000, 5000, 1, 600, 1, 600),
        9000,
        500,
        "12 % of the characters and 0.1 % of the words are lost as [UNK], most of them in words of over 500 "
        "characters, as scripts without spaces give them; put spaces between the words",
    ),
]


@pytest.mark.parametrize(("counts", "num_tokens", "word_chars", "notice"), NOTICES)
def test_a_notice_comes_above_one_percent_and_says_why(counts, num_tokens, word_chars, notice):
    assert counts.notice(num_tokens, word_chars) == notice


@pytest.mark.parametrize("share", [0.2, 0])
def test_the_command_tells_the_shares(tmp_path, capfd, tokenizer_folder, share):
    texts = documents(2, share)
    source = write_lines(tmp_path / "a.jsonl", texts)
    arguments = ["--input", source, "--tokenizer", tokenizer_folder, "--output-prefix", str(tmp_path / "out")]
    assert data.main([*arguments, "--workers", "1"]) == 0
    manifest = PairManifest.read(str(tmp_path / "out"))
    assert manifest is not None
    assert manifest.unknown is not None
    lines = capfd.readouterr().err.splitlines()
    described = manifest.unknown.describe(manifest.num_tokens)
    if share:
        notice = manifest.unknown.notice(manifest.num_tokens, 100)
        assert notice is not None
        assert lines[-2:] == [described, f"notice: {notice}"]
    else:
        assert lines[-1] == described
        assert described == ("[UNK] is 0 % of the tokens; in it 0 % of the words and 0 % of the characters are lost")
