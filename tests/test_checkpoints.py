"""Checkpoints: looked into, cut anew, kept or deleted, damaged, written while training goes on."""

import json
import shutil
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_runs import flags_for, without_times
from peer_scale.checkpoints.folder import committed, newest
from peer_scale.checkpoints.pieces import write_tensors
from peer_scale.commands import convert
from runs import read_metrics, train_in_pool, train_to_refusal

# --- the tool


@pytest.fixture(scope="module")
def saved(two_ranks, tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("saved")
    two_ranks.run(train_in_pool, flags_for(folder, text_file, "log", "--save", folder / "save", stage=3))
    return folder / "save" / "step_00000004"


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / saved.name)


@pytest.fixture
def tool(capfd):
    def run(*arguments):
        code = convert.main(list(map(str, arguments)))
        captured = capfd.readouterr()
        assert (code, bool(captured.err)) in ((0, False), (2, True))
        if code:
            assert captured.err.startswith("error: ")
            assert captured.err.count("\n") == 1
        return code, captured.err or captured.out

    return run


def test_inspect_shows_each_tensor_and_the_tie(saved, tool):
    code, text = tool("inspect", "--load", saved.parent)
    assert code == 0
    tensors = json.loads((saved / "peer_scale.json").read_text())["tensors"]
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert set(tensors) <= set(lines)
    word = lines["embeddings.word.weight"]
    assert "2000 x 128" in word and "1 along 0" in word and "float32" in word and "mlm_head" in word
    assert "128 x 512" in lines["generator.layers.0.feed_forward.down.weight"]
    assert "1 along 1" in lines["generator.layers.0.feed_forward.down.weight"]
    assert "whole" in lines["embeddings.norm.weight"]
    assert "zero_stage 3" in text and "step 4" in text


def test_verify_names_what_is_damaged(copy, tool):
    code, text = tool("verify", "--load", copy)
    assert code == 0 and f"{len(list(copy.rglob('*.*'))) - 1} files" in text
    shard = copy / "rank_00001.safetensors"
    content = shard.read_bytes()

    def refused(damaged):
        shard.write_bytes(damaged)
        code, text = tool("verify", "--load", copy)
        assert code == 2 and str(shard) in text
        return text

    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    assert "is damaged" in refused(bytes(flipped))
    assert f"is {len(content) - 1} bytes" in refused(content[:-1])
    shard.unlink()
    code, text = tool("verify", "--load", copy)
    assert code == 2 and f"{shard}: is missing" in text
    shard.write_bytes(content)
    vocabulary = copy / "tokenizer" / "vocab.txt"
    vocabulary.write_bytes(vocabulary.read_bytes().replace(b"a", b"b", 1))
    code, text = tool("verify", "--load", copy)
    assert code == 2 and "vocab.txt: is damaged" in text


def test_a_manifest_that_leaves_a_gap_is_refused(copy, tool):
    path = copy / "peer_scale.json"
    manifest = json.loads(path.read_text())
    manifest["tensors"]["mlm_head.bias"]["pieces"].pop()
    path.write_text(json.dumps(manifest))
    code, text = tool("verify", "--load", copy)
    assert code == 2 and "mlm_head.bias is not whole: shard 0: 1000 of its 2000" in text
    manifest["format_version"] = 1
    path.write_text(json.dumps(manifest))
    assert "format 1; this version reads 2 and 3" in tool("inspect", "--load", copy)[1]


def test_reshape_gives_each_rank_a_file_and_comes_back_bit_for_bit(saved, tool, tmp_path):
    four, one = tmp_path / "four", tmp_path / "one"
    cut = ("--tensor-model-parallel-size", 2, "--num-files", 4)
    code, text = tool("reshape", "--load", saved, "--output", four, *cut)
    assert code == 0 and "bit for bit" in text
    files = {f"rank_{rank:05d}.safetensors": load_file(four / f"rank_{rank:05d}.safetensors") for rank in range(4)}
    assert {path.name for path in four.iterdir()} == {*files, "peer_scale.json", "tokenizer"}
    down = "generator.layers.0.feed_forward.down.weight"
    ours = torch.cat([load_file(saved / f"rank_{r:05d}.safetensors")[f"exp_avg/{down}"] for r in range(2)])
    halves = ours.view(128, 512).chunk(2, dim=1)
    for rank, content in enumerate(files.values()):
        expected = halves[rank % 2].flatten().chunk(2)[rank // 2]
        assert torch.equal(content[f"exp_avg/{down}"], expected)
        assert ("weight/embeddings.norm.weight" in content) == (rank % 2 == 0)

    assert tool("reshape", "--load", four, "--output", one)[0] == 0
    whole = load_file(one / "rank_00000.safetensors")
    parts = [load_file(saved / f"rank_{rank:05d}.safetensors") for rank in range(2)]
    assert all(torch.equal(whole[key], torch.cat([p[key] for p in parts if key in p])) for key in whole)
    assert set(whole) == {key for part in parts for key in part}


def test_what_reshape_refuses(saved, copy, tool, tmp_path):
    def refused(*arguments, load=saved):
        code, text = tool("reshape", "--load", load, "--output", tmp_path / "out", *arguments)
        assert code == 2 and not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return text

    assert "--num-files 3 is not a multiple" in refused("--tensor-model-parallel-size", 2, "--num-files", 3)
    assert "does not divide dimension" in refused("--tensor-model-parallel-size", 5)
    shard = copy / "rank_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"abcd")
    assert f"{shard}: is damaged" in refused(load=copy)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, text = tool("reshape", "--load", saved, "--output", tmp_path / "out")
    assert code == 2 and "is not an empty folder" in text and (tmp_path / "out" / "mine").exists()


# --- the trainer


def test_the_trainer_names_what_is_damaged_on_all_ranks(two_ranks, copy, text_file, tmp_path):
    flags = flags_for(tmp_path, text_file, "log", "--load", copy, steps=6)
    shard = copy / "rank_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 128
    shard.write_bytes(content)
    messages = two_ranks.run(train_to_refusal, flags)
    assert messages[0] == messages[1] and f"{shard}: is damaged" in messages[0]
    shard.unlink()
    assert f"{shard}: is missing" in two_ranks.run(train_to_refusal, flags)[1]


def test_the_newest_and_every_so_many_are_kept(one_rank, text_file, tmp_path):
    save = tmp_path / "save"
    (save / ".removing_step_00000001").mkdir(parents=True)
    keep = ("--save", save, "--save-interval", 1, "--keep-last", 2, "--keep-every", 3, "--micro-batch-size", 4)
    one_rank.run(train_in_pool, flags_for(tmp_path, text_file, "log", *keep, steps=8))
    assert [folder.name for folder in committed(save)] == [f"step_{step:08d}" for step in (3, 6, 7, 8)]
    assert sorted(path.name for path in save.iterdir())[:1] == ["latest"]
    assert (save / "latest").read_text() == "step_00000008"


def train_beside_a_slow_disk(flags, log_dir, steps):
    """The write begins when training has gone on for some steps."""
    from peer_scale.checkpoints import writer

    def slow(*args):
        deadline = time.monotonic() + 60
        while len(read_metrics(log_dir)) < steps:
            if time.monotonic() > deadline:
                raise OSError("training does not go on")
            time.sleep(0.02)
        return write_tensors(*args)

    writer.write_tensors = slow
    try:
        return train_in_pool(flags)
    finally:
        writer.write_tensors = write_tensors


def same_for_all_starts(sections):
    """What a manifest says of a run, without when and by what it was started."""
    return replace(sections, saving=None, provenance=replace(sections.provenance, start=None))


def test_training_goes_on_while_the_state_of_one_moment_is_written(two_ranks, text_file, tmp_path):
    def flags(name, *more):
        save = ("--save", tmp_path / name, "--save-interval", 2, "--keep-last", 9)
        return flags_for(tmp_path, text_file, f"{name}-log", *save, *more, steps=8)

    # step 2's save is written after step 3 has been reported, step 4's save waits for it, and so on
    behind = two_ranks.run(train_beside_a_slow_disk, flags("behind"), str(tmp_path / "behind-log"), 3)[0]
    at_once = two_ranks.run(train_in_pool, flags("at-once", "--no-async-save"))[0]
    assert without_times(behind) == without_times(at_once)
    for step in (2, 4, 6, 8):
        found = [newest(tmp_path / name / f"step_{step:08d}")[1] for name in ("behind", "at-once")]
        assert found[0].files == found[1].files
        assert same_for_all_starts(found[0].sections) == same_for_all_starts(found[1].sections)
    digests = [newest(tmp_path / "behind" / f"step_{step:08d}")[1].files["rank_00000.safetensors"] for step in (2, 4)]
    assert digests[0] != digests[1]
