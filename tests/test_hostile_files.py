"""Files of strangers: whatever they say, a command ends with exit code 2 and one line, soon and with little memory."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest

from checkpoint_runs import WHOLE, write_manifest, write_random
from peer_scale.checkpoints.manifest import MANIFEST
from peer_scale.commands import convert, data
from peer_scale.corpus.store import TokenStore
from peer_scale.corpus.wordpiece import load_wordpiece, train_wordpiece
from peer_scale.errors import UserError
from peer_scale.settings.config_file import read_config_file
from token_files import write_pair

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(["the quick brown fox jumps over the lazy dog " * 20, "pack my box"], 200)


@pytest.fixture
def checkpoint(tmp_path, wordpiece):
    folder = tmp_path / "saved"
    model = replace(WHOLE.model, vocab_size=wordpiece.vocab_size)
    write_random(folder, model, WHOLE.objective, "ranker", wordpiece)
    return folder / "step_00000000"


@pytest.fixture
def refused(capfd):
    """Run a command's main function, which must refuse its input; gives the one line."""

    def run(main, *arguments):
        assert main(list(map(str, arguments))) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and lines[0].isprintable(), lines
        return lines[0]

    return run


def first_tensor(content):
    return next(iter(content["tensors"].values()))


def rename_file(content, name):
    (old,) = (file for file in content["files"] if file.endswith(".safetensors"))
    content["files"][name] = content["files"].pop(old)
    for entry in content["tensors"].values():
        entry["pieces"] = [[name, *piece[1:]] for piece in entry["pieces"]]


MANIFESTS = {
    "above": lambda content: rename_file(content, "../outside.safetensors"),
    "absolute": lambda content: rename_file(content, "/etc/passwd"),
    "through the root": lambda content: rename_file(content, "a/../../outside"),
    "no name": lambda content: rename_file(content, ""),
    "null in a name": lambda content: rename_file(content, "a\0b"),
    "a piece elsewhere": lambda content: first_tensor(content)["pieces"][0].__setitem__(0, "../x"),
    "negative bytes": lambda content: next(iter(content["files"].values())).__setitem__(0, -1),
    "2**40 shards": lambda content: first_tensor(content).update(shard_dim=0, shards=2**40, pieces=[]),
    "no shards": lambda content: first_tensor(content).update(shards=0, pieces=[]),
    "negative padding": lambda content: first_tensor(content).update(padding=-8),
    "a dimension of 2**60": lambda content: first_tensor(content).update(shape=[2**60, 2**60]),
    "no such dimension": lambda content: first_tensor(content).update(shard_dim=7),
    "negative length": lambda content: first_tensor(content)["pieces"][0].__setitem__(3, -5),
    "a piece of no shard": lambda content: first_tensor(content)["pieces"].append(["rank_00000.safetensors", 3, 0, 1]),
    "progress with another key": lambda content: content["progress"].update(other=1),
    "an escape sequence": lambda content: content["objective"].update(kind="\x1b[2Jerror: all is well\n"),
    "a long name": lambda content: content["objective"].update(kind="x" * 1_000_000),
    "sections of another kind": lambda content: content.update(model=[1, 2]),
    "no tensors": lambda content: content.update(tensors=None),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(checkpoint, refused, case):
    path = checkpoint / MANIFEST
    content = json.loads(path.read_text())
    MANIFESTS[case](content)
    write_manifest(path, content)
    assert MANIFEST in refused(convert.main, "verify", "--load", checkpoint)


@pytest.mark.parametrize("text", [DEEP, '{"format_version": 3, "tensors": ' + DEEP, "\0", "\ufeff{}", "{} {}"])
def test_manifests_that_are_no_objects(checkpoint, refused, text):
    (checkpoint / MANIFEST).write_text(text)
    assert MANIFEST in refused(convert.main, "verify", "--load", checkpoint)


def test_a_link_out_of_the_checkpoint(checkpoint, refused, tmp_path):
    (file,) = checkpoint.glob("*.safetensors")
    outside = file.rename(tmp_path / "outside.safetensors")
    file.symlink_to(outside)
    assert "not within its folder" in refused(convert.main, "verify", "--load", checkpoint)


def test_a_file_in_the_way_is_not_followed(tmp_path):
    """Nobody can foresee the name of what is written aside, so a link placed there leads nowhere."""
    from peer_scale.storage import write_atomically

    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~_umask(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _umask(folder):
    (folder / "plain").touch()
    mode = (folder / "plain").stat().st_mode & 0o777
    (folder / "plain").unlink()
    return 0o666 & ~mode


def hugging_face(folder, config, **files):
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_code_of_strangers_is_not_run(tmp_path, refused):
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    folder = hugging_face(
        tmp_path / "model", {"model_type": "evil", "auto_map": auto_map}, evil__py="open('ran', 'w').write('x')"
    )
    line = refused(convert.main, "from-hf", "--bert", folder, "--output", tmp_path / "out")
    assert str(folder) in line and not list(tmp_path.rglob("ran"))


@pytest.mark.parametrize(
    "config", [DEEP, "[]", '{"model_type": ["electra"]}', '{"model_type": "electra", "hidden_size": "a"}']
)
def test_configurations_of_hugging_face(tmp_path, refused, config):
    folder = hugging_face(tmp_path / "model", config)
    assert str(folder) in refused(convert.main, "from-hf", "--bert", folder, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "index", [DEEP, "[]", '{"weight_map": {"a": "../../outside.safetensors"}}', '{"weight_map": {"a": 3}}']
)
def test_an_index_of_weights(tmp_path, refused, index):
    folder = hugging_face(tmp_path / "model", {"model_type": "electra"})
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refused(
        convert.main, "from-hf", "--bert", folder, "--output", tmp_path / "out"
    )


def test_ids_that_would_take_gigabytes(tmp_path, wordpiece):
    wordpiece.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["huge"] = 2**31 - 1
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="ids must be below 1048576"):
        load_wordpiece(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_nested_files_of_a_tokenizer(tmp_path, wordpiece, name):
    wordpiece.save(tmp_path)
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError, match=name):
        load_wordpiece(str(tmp_path))


def test_aliases_that_stand_for_billions(tmp_path):
    lines = ["a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    path = tmp_path / "run.yaml"
    path.write_text("\n".join([*lines, "seed: *a9"]))
    with pytest.raises(UserError, match="aliases stand for 100,000 values or more"):
        read_config_file(path)


def pair(folder, documents=50):
    rng = np.random.default_rng(0)
    return write_pair(folder / "pair", [rng.integers(5, 100, int(rng.integers(3, 40))) for _ in range(documents)])


@pytest.mark.parametrize("what", ["pointers", "bounds"])
@pytest.mark.parametrize("value", [-8, 2**62, 3])
def test_an_index_that_points_outside(tmp_path, what, value):
    prefix = pair(tmp_path)
    position = 34 + 50 * 4 + (25 if what == "pointers" else 50 + 25) * 8
    with open(f"{prefix}.idx", "r+b") as file:
        file.seek(position)
        file.write(struct.pack("<q", value))
    with pytest.raises(UserError, match=r"pair\.idx"):
        read_all(TokenStore.open([prefix]))


def read_all(store):
    lengths = store.document_lengths(0, store.num_documents)
    return [store.read(number, 0, int(length)).tolist() for number, length in enumerate(lengths)]


def test_verify_of_a_pair_reads_all_of_its_index(tmp_path, refused):
    assert "no manifest" in refused(data.main, "--verify", pair(tmp_path))
