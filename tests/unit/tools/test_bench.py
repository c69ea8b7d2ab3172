"""The benchmark's own claims: peers that are what they say, ratios that are what is printed."""

import json
import subprocess
import sys

import pytest
import torch

import bench
import bench_peers
from peer_scale.objectives.task import PretrainingTask
from peer_scale.parallel.topology import single_process_topology
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
        loss = pair.eval()(bench.synthetic_batch(run, torch.device("cpu"))).item()
    expected = torch.log(torch.tensor(float(run.model.vocab_size))) + 50 * torch.log(torch.tensor(2.0))
    assert loss == pytest.approx(expected.item(), rel=0.03)


def test_ratios_are_paired():
    result = bench.summarise("head-forward", [(1.0, 2.0), (10.0, 30.0), (100.0, 400.0)])
    assert result.ratio == 3.0
    assert result.quartiles == (2.5, 3.5)
    assert (result.ours_ms, result.peer_ms) == (10_000.0, 30_000.0)


@pytest.mark.slow
def test_the_command(tmp_path):
    out = tmp_path / "bench.json"
    rows = ["step-transformers-bf16", "step-plain-loop", "step-matrix-products", "head-forward", "head-backward"]
    flags = ["--model", "peer-tiny", "--batch", "2", "--seq-length", "32", "--repeats", "2", "--json", out]
    command = [sys.executable, PROJECT / "tools/bench.py", *flags, "--rows", *rows, "kernel-norm", "kernel-gelu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = {entry["row"]: entry for entry in json.loads(out.read_text())}
    assert len(results) == 7
    for row, entry in results.items():
        assert entry["ours_ms"] > 0 and entry["ratio"] > 0
        assert (entry["tokens_per_second"] is None) == (not row.startswith("step-"))
        assert row in done.stdout
    step = results["step-transformers-bf16"]
    if step["peer_mib"] is not None:  # where the system tells
        assert step["peer_mib"] > 4 * 2_000_000 / 2**20, "two million parameters have fp32 gradients"
        assert "MiB" in done.stdout


def test_an_objective_with_other_losses_has_no_such_peer_but_the_others():
    run = small_run("--model", "teams-tiny")
    setting = bench_peers.Setting(run, single_process_topology(), bench.synthetic_batch(run, torch.device("cpu")))
    with pytest.raises(bench_peers.MissingPeer, match="teams-tiny has others"):
        bench_peers.transformers_step(setting, autocast=False)
    bench_peers.plain_loop(setting)()
    bench_peers.matrix_products(setting)()
