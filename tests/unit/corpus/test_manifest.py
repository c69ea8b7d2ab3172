import json
from pathlib import Path

import pytest

from peer_scale.corpus.manifest import InputSummary, PairManifest, has_manifest
from peer_scale.corpus.prepare import preprocess
from peer_scale.corpus.store import TokenStore, verify
from peer_scale.errors import UserError

pytestmark = pytest.mark.heavy

# What earlier versions wrote, byte for byte; the name of the input is not UTF-8.
WRITTEN = """{
  "format": "peer_scale tokens",
  "version": 1,
  "key": "k",
  "tokenizer_digest": "d",
  "vocab_size": 300,
  "num_documents": 3,
  "num_tokens": 40,
  "bin_bytes": 80,
  "bin_sha256": "b",
  "idx_bytes": 70,
  "idx_sha256": "i",
  "fingerprint": "f",
  "inputs": [
    {
      "path": "a\\udcff/gr\\u00f6\\u00dfer",
      "files": 2,
      "bytes": 1000
    }
  ]
}
"""
MANIFEST = PairManifest(
    key="k",
    tokenizer_digest="d",
    vocab_size=300,
    num_documents=3,
    num_tokens=40,
    bin_bytes=80,
    bin_sha256="b",
    idx_bytes=70,
    idx_sha256="i",
    fingerprint="f",
    inputs=(InputSummary("a\udcff/größer", 2, 1000),),
)


def test_what_is_written_is_what_earlier_versions_wrote_and_is_read_back(tmp_path):
    prefix = str(tmp_path / "corpus")
    MANIFEST.write(prefix)
    assert Path(f"{prefix}.json").read_text() == WRITTEN
    assert PairManifest.read(prefix) == MANIFEST


@pytest.mark.parametrize("content", [None, "{", '{"text": "a"}\n{"text": "b"}\n', "[1]", '{"format": "other"}', "5"])
def test_no_file_and_other_kinds_of_files_are_no_manifest(tmp_path, content):
    if content is not None:
        (tmp_path / "corpus.json").write_text(content)
    prefix = str(tmp_path / "corpus")
    assert PairManifest.read(prefix) is None
    assert not has_manifest(prefix)


def test_a_large_file_is_no_manifest(tmp_path):
    (tmp_path / "corpus.json").write_text(WRITTEN + " " * (5 << 20))
    assert PairManifest.read(str(tmp_path / "corpus")) is None


BAD_MANIFESTS = [
    ({"version": 2}, "version 2, but only 1 can be read"),
    ({"version": None}, "version None, but only 1 can be read"),
    ({"fingerprint": None}, "fingerprint: Field required"),
    ({"num_tokens": "many"}, "num_tokens: Input should be a valid integer"),
    ({"inputs": [{"path": "a", "files": 1}]}, r"inputs\.0\.bytes: Field required"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_MANIFESTS)
def test_a_bad_manifest_is_named_and_is_made_anew_with_the_pair(copy, raw, wordpiece, changes, message):
    path = Path(f"{copy}.json")
    before = path.read_text()
    content = json.loads(before) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    for use in (PairManifest.read, verify, lambda prefix: TokenStore.open([prefix])):
        with pytest.raises(UserError, match=message) as caught:
            use(copy)
        assert str(caught.value).startswith(f"{copy}.json: ")
        assert "\n" not in str(caught.value)
    assert has_manifest(copy)
    preprocess([str(raw)], wordpiece, copy, part_bytes=50_000)
    assert path.read_text() == before
