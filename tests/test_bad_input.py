"""Bad input ends before any training: exit code 2 and one line that names what is wrong.

What is wrong with settings is tested in tests/unit/settings; here a few of them go through the whole command.
"""

import json
import re
import shutil

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from peer_scale.corpus.wordpiece import train_wordpiece
from peer_scale.pretrain import main
from runs import SMALL, corpus, pretrain, torchrun, train_in_pool


@pytest.fixture
def refused(capfd, tmp_path, text_file):
    """Run the trainer on flags that must be refused; gives its one line."""

    def run(*flags, data=True):
        if dist.is_initialized():
            dist.destroy_process_group()
        where = ["--data-path", text_file] if data else []
        argv = [*SMALL, *where, "--cache-dir", tmp_path / "cache", "--train-iters", 2, "--num-workers", 0, *flags]
        assert main([str(part) for part in argv]) == 2
        captured = capfd.readouterr()
        progress = ("tokenising", "training a WordPiece")
        lines = [line for line in captured.err.splitlines() if not line.startswith(progress)]
        assert len(lines) == 1, captured.err
        assert lines[0].startswith("error: ")
        assert "step 1/" not in captured.out, "it must end before training"
        return lines[0]

    return run


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def indexed(folder, vocab=100, documents=4):
    prefix = folder / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for number in range(documents):
        tokens = np.random.default_rng(number).integers(5, vocab, 300)
        builder.add_document(tokens, [300])
    builder.finalize(f"{prefix}.idx")
    return prefix


def tokenizer(folder, vocab_size=200):
    train_wordpiece(["the quick brown fox jumps over the lazy dog " * 20, "pack my box"], vocab_size).save(folder)
    return folder


def test_data(refused, tmp_path):
    missing = tmp_path / "missing.txt"
    assert "missing.txt" in refused("--data-path", missing, data=False)
    assert "empty.txt" in refused("--data-path", write(tmp_path / "empty.txt", ""), data=False)
    (tmp_path / "folder").mkdir()
    assert "folder" in refused("--data-path", tmp_path / "folder", data=False)
    latin = write(tmp_path / "latin.txt", "caf\xe9 au lait\n".encode("latin-1"))
    line = refused("--data-path", latin, data=False)
    assert "latin.txt" in line and "UTF-8" in line
    broken = write(tmp_path / "broken.jsonl", '{"text": "fine"}\n{"text": \n')
    assert re.search(r"broken\.jsonl:2|broken\.jsonl.*line 2", refused("--data-path", broken, data=False))
    keyless = write(tmp_path / "keyless.jsonl", '{"text": "fine"}\n{"body": "no"}\n')
    line = refused("--data-path", keyless, data=False)
    assert re.search(r"keyless\.jsonl:2|keyless\.jsonl.*line 2", line) and "text" in line


def test_indexed_data(refused, tmp_path):
    prefix = indexed(tmp_path)
    vocabulary = tokenizer(tmp_path / "tokenizer")
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(1000)
    line = refused("--data-path", prefix, "--tokenizer", vocabulary, data=False)
    assert "corpus.bin" in line and "1000" in line.replace(",", "")


def test_tokenizers(refused, tmp_path):
    assert "nowhere" in refused("--tokenizer", tmp_path / "nowhere")
    folder = tokenizer(tmp_path / "tokenizer")
    words = [w for w in (folder / "vocab.txt").read_text().splitlines() if w != "[MASK]"]
    line = refused("--tokenizer", write(tmp_path / "vocab.txt", "\n".join(words) + "\n"))
    assert "[MASK]" in line and "vocab.txt" in line
    many = write(
        tmp_path / "many.txt", "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(70_000))])
    )
    line = refused("--data-path", indexed(tmp_path), "--tokenizer", many, data=False)
    assert "uint16" in line and "70005" in line.replace(",", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--global-batch-size", "10", "--micro-batch-size", "4"), ("10", "4", "micro-batch")),
        (("--model", "peer-smal"), ("peer-smal", "did you mean peer-small")),
        (("--pipeline-model-parallel-size", "2"), ("--pipeline-model-parallel-size 2", "must divide")),
        (("--lr", "fast"), ("--lr", "fast")),
        (("--no-such-flag",), ("--no-such-flag",)),
        (("--config", "no-such.yaml"), ("no-such.yaml",)),
        (("--deepspeed_config", "no-such.json"), ("no-such.json",)),
        (("--fp16",), ("fp16 is not supported",)),
    ],
)
def test_settings(refused, flags, said):
    line = refused(*flags)
    for part in said:
        assert part in line


def test_output_folder_that_cannot_be_written(refused, tmp_path):
    blocker = write(tmp_path / "file", "in the way")
    assert "--log-dir" in refused("--log-dir", blocker / "logs")
    assert "--save" in refused("--save", blocker / "save")


def test_all_ranks_end_together_and_only_the_first_speaks(tmp_path, text_file):
    flags = ("--data-path", text_file, "--cache-dir", tmp_path, "--log-dir", write(tmp_path / "file", "x") / "logs")
    done = pretrain(*flags, launcher=torchrun(2), timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("error: --log-dir") == 1
    assert "exitcode  : 2" in done.stderr


@pytest.fixture
def checkpoint(one_rank, tmp_path, text_file):
    save = tmp_path / "save"
    flags = (*corpus(text_file), "--train-iters", 2, "--save", save, "--log-dir", tmp_path / "log")
    one_rank.run(train_in_pool, list(map(str, flags)))
    return save


def test_loading_what_does_not_fit(refused, checkpoint):
    line = refused("--load", checkpoint, "--hidden-size", 64)
    assert "hidden_size" in line and "128" in line and "64" in line
    line = refused("--load", checkpoint, "--model", "electra-tiny")
    assert "num_levels" in line
    damaged = next((checkpoint / "step_00000002").glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    line = refused("--load", checkpoint)
    assert damaged.name in line and "bytes" in line
    manifest = checkpoint / "step_00000002" / "peer_scale.json"
    manifest.write_text(manifest.read_text()[:-40])
    assert "peer_scale.json" in refused("--load", checkpoint)


@pytest.mark.slow
def test_disk_full_while_saving(mount_disk, tmp_path, text_file):
    small_disk = mount_disk("24m")  # room for one checkpoint, but not for two
    flags = (*corpus(text_file), "--save", small_disk / "save")
    saving = ("--save-interval", 2, "--keep-last", 9, "--save-retry-seconds", 0, "--max-failed-saves", 2)
    done = pretrain(*flags, "--train-iters", 9, *saving, launcher=torchrun(2))
    assert done.returncode != 0
    assert (
        done.stderr.count("warning: --save") == 3
        and "make room for 2" in done.stderr
        and done.stderr.count("stopped: 2 saves in a row") == 1
    ), done.stderr
    assert "exitcode  : 75" in done.stderr
    assert "could not be" in done.stderr and "older ones stay good" in done.stderr
    kept = sorted((small_disk / "save").glob("step_*"))
    assert [path.name for path in kept] == ["step_00000002"]
    shutil.copytree(small_disk / "save", tmp_path / "copy")
    resumed = pretrain(*flags[:-2], "--load", tmp_path / "copy", "--train-iters", 3, launcher=torchrun(2))
    assert resumed.returncode == 0, resumed.stderr
    assert "after step 2" in resumed.stdout
    assert json.loads((kept[0] / "peer_scale.json").read_text())["progress"]["step"] == 2
