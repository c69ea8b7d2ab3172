#!/usr/bin/env python3
"""Speed against named peers, in one process and alternating: the table of ratios.

python tools/bench.py                                  # peer-small, 32 x 128 tokens, bf16
python tools/bench.py --rows head-forward step-plain-loop --repeats 9 --json bench.json
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peer_scale.quiet import silence_libraries

silence_libraries()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pydantic import PositiveInt  # noqa: E402
from torch import Tensor  # noqa: E402

from bench_memory import working_memory  # noqa: E402
from bench_peers import (  # noqa: E402
    Action,
    MissingPeer,
    Setting,
    electra_pytorch_step,
    matrix_products,
    our_task,
    plain_loop,
    transformers_step,
)
from peer_scale.checkpoints.folder import CheckpointFolder  # noqa: E402
from peer_scale.checkpoints.progress import Progress  # noqa: E402
from peer_scale.checkpoints.sections import sections_of  # noqa: E402
from peer_scale.checkpoints.state import TrainingState  # noqa: E402
from peer_scale.checkpoints.writer import CheckpointWriter  # noqa: E402
from peer_scale.corpus.wordpiece import MIN_VOCAB_SIZE, train_wordpiece  # noqa: E402
from peer_scale.errors import UserError  # noqa: E402
from peer_scale.flops import actual_train_flops, measure_peak_flops, peak_flops  # noqa: E402
from peer_scale.host_memory import keep_freed_memory  # noqa: E402
from peer_scale.kernels.gelu import bias_gelu  # noqa: E402
from peer_scale.kernels.norm import bias_dropout_residual_norm  # noqa: E402
from peer_scale.models.generator_head import generator_head  # noqa: E402
from peer_scale.parallel.coordination import RankCoordinator  # noqa: E402
from peer_scale.parallel.environment import ProcessEnvironment  # noqa: E402
from peer_scale.parallel.topology import build_topology, init_process_group  # noqa: E402
from peer_scale.samples.examples import Batch  # noqa: E402
from peer_scale.settings.arguments import Parser, of  # noqa: E402
from peer_scale.settings.flags import build_parser  # noqa: E402
from peer_scale.settings.resolve import resolve  # noqa: E402
from peer_scale.settings.run import RunConfig, SeqLength  # noqa: E402
from peer_scale.training.engine import build_engine  # noqa: E402
from peer_scale.training.metering import Meter  # noqa: E402
from peer_scale.training.runner import WholeModelRunner  # noqa: E402
from peer_scale.training.trainer import Trainer  # noqa: E402


@dataclass(frozen=True)
class Result:
    """A row: medians of the times, and of the paired ratios peer / ours with their quartiles.

    Memory is what one call needs beyond what is there before it, in MiB (None where the system does not tell).
    """

    row: str
    peer: str
    ours_ms: float
    peer_ms: float
    ratio: float
    quartiles: tuple[float, float]
    ours_mib: float | None = None
    peer_mib: float | None = None
    tokens_per_second: float | None = None
    share_of_peak: float | None = None


def synthetic_batch(run: RunConfig, device: torch.device) -> Batch:
    """Full sequences of random tokens: what is timed does not depend on which."""
    generator = torch.Generator().manual_seed(0)
    size, seq_length = run.training.micro_batch_size, run.training.seq_length
    num_predictions = run.masking.num_predictions(seq_length)
    ids = torch.randint(5, run.model.vocab_size, (size, seq_length), generator=generator)
    positions = torch.stack([torch.randperm(seq_length, generator=generator)[:num_predictions] for _ in range(size)])
    positions = positions.sort(1).values
    return Batch(
        input_ids=ids,
        masked_ids=ids.scatter(1, positions, 4),
        token_types=torch.zeros_like(ids),
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        positions=positions,
        is_selected=torch.ones_like(positions, dtype=torch.bool),
        uniforms=torch.rand(positions.shape, generator=generator),
        extra_uniforms=torch.rand((*positions.shape, run.objective.num_extra_uniforms), generator=generator),
    ).to(device)


@dataclass(frozen=True)
class Prepared:
    """What is timed after something that is not."""

    prepare: Action
    action: Action

    def __call__(self) -> object:
        return self.action()


def our_step(setting: Setting) -> Action:
    """The trainer's own step: DeepSpeed with ZeRO-2."""
    return our_trainer(setting)[1]


def our_trainer(setting: Setting) -> tuple[Any, Action]:
    """DeepSpeed's engine, and the trainer's own step with it."""
    engine = build_engine(our_task(setting), setting.run, setting.topology)
    runner = WholeModelRunner(engine, setting.topology)
    meter = Meter(setting.run, 1, None)
    trainer = Trainer(
        setting.run,
        setting.topology,
        RankCoordinator(),
        engine,
        runner,
        meter,
        [],
        progress=Progress(),
        warmup_steps=0,
    )
    return engine, lambda: trainer.train_step(1, [setting.batch])


def saving_pair(setting: Setting, folder: Path, *, copy_alone: bool) -> tuple[Action, Action]:
    """A step while a checkpoint is written (or what a save holds training up for), and a step while none is."""
    engine, step = our_trainer(setting)
    tokenizer = train_wordpiece([__doc__ or ""], MIN_VOCAB_SIZE)
    state = TrainingState(engine, setting.topology, setting.run.model.vocab_size)
    kept = CheckpointFolder(folder, keep_last=1)
    sections = sections_of(setting.run, setting.topology, data_fingerprint="", tokenizer_digest=tokenizer.digest)
    writer = CheckpointWriter(folder, kept, state, RankCoordinator(), sections, tokenizer, in_background=True)
    numbers = itertools.count(1)

    def save() -> None:
        writer.save(Progress(next(numbers)))

    def begin() -> None:
        writer.finish()
        save()

    return Prepared(writer.finish, save) if copy_alone else Prepared(begin, step), Prepared(writer.finish, step)


def head_pair(setting: Setting, *, backward: bool) -> tuple[Action, Action]:
    """The generator head and the bare products for the same logits (backward: recomputation and two gradients)."""
    model, device = setting.run.model, setting.topology.device
    n = setting.batch.positions.numel()
    hidden = torch.randn(n, model.embedding_size, device=device).bfloat16().requires_grad_()
    weight = (0.05 * torch.randn(model.vocab_size, model.embedding_size, device=device)).bfloat16().requires_grad_()
    bias = torch.zeros(model.vocab_size, device=device, requires_grad=True)
    targets = torch.randint(model.vocab_size, (n,), device=device)
    uniforms = torch.rand(n, device=device)
    logits = torch.empty(n, model.vocab_size, device=device).bfloat16()
    if not backward:
        with_grad = torch.no_grad()
        return (
            with_grad(lambda: generator_head(hidden, weight, bias, targets, uniforms)),
            with_grad(lambda: torch.mm(hidden, weight.t(), out=logits)),
        )
    loss = generator_head(hidden, weight, bias, targets, uniforms).loss.sum()

    @torch.no_grad()
    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        logits @ weight
        logits.t() @ hidden

    return lambda: torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True), products


def kernel_pair(setting: Setting, name: str) -> tuple[Action, Action]:
    """A fused kernel and torch's composition, forward and backward."""
    shape = setting.run.model.generator
    width = shape.ffn_hidden_size if name == "gelu" else shape.hidden_size
    training, device = setting.run.training, setting.topology.device
    x, residual, grad = (
        torch.randn(training.seq_length, training.micro_batch_size, width, device=device).bfloat16() for _ in range(3)
    )
    bias, weight, norm_bias = (torch.ones(width, device=device).bfloat16() for _ in range(3))
    tensors = [t.requires_grad_() for t in (x, bias, residual, weight, norm_bias)]
    dropout = setting.run.model.hidden_dropout

    def composed() -> Tensor:
        if name == "gelu":
            return F.gelu(x + bias)
        return F.layer_norm(residual + F.dropout(x + bias, dropout), (width,), weight, norm_bias, 1e-12)

    def fused() -> Tensor:
        if name == "gelu":
            return bias_gelu(x, bias)
        return bias_dropout_residual_norm(x, bias, residual, weight, norm_bias, dropout=dropout, eps=1e-12)

    wanted = tensors[:2] if name == "gelu" else tensors
    return lambda: torch.autograd.grad(fused(), wanted, grad), lambda: torch.autograd.grad(composed(), wanted, grad)


ROWS: dict[str, tuple[str, bool]] = {  # name: the peer, and whether it is a whole training step
    "step-transformers-fp32": ("transformers, tied and shared, fp32", True),
    "step-transformers-bf16": ("transformers, tied and shared, bf16 autocast", True),
    "step-electra-pytorch-fp32": ("electra-pytorch around them, fp32", True),
    "step-electra-pytorch-bf16": ("electra-pytorch around them, bf16 autocast", True),
    "step-plain-loop": ("our model without DeepSpeed", True),
    "step-matrix-products": ("the bare matrix products", True),
    "step-while-saving": ("the same step while nothing is saved", True),
    "save-copy": ("a step: what a background save holds training up for", False),
    "head-forward": ("the bare product of the logits", False),
    "head-backward": ("its three products", False),
    "kernel-norm": ("torch's composition", False),
    "kernel-gelu": ("torch's composition", False),
}


def build_row(name: str, setting: Setting, folder: Path) -> tuple[Action, Action]:
    """Ours and the peer's, ready to be called; `folder` is for files."""
    if name in ("step-while-saving", "save-copy"):
        return saving_pair(setting, folder, copy_alone=name == "save-copy")
    if name.startswith("head-"):
        return head_pair(setting, backward=name == "head-backward")
    if name.startswith("kernel-"):
        return kernel_pair(setting, name.removeprefix("kernel-"))
    peers: dict[str, Callable[[], Action]] = {
        "step-transformers-fp32": lambda: transformers_step(setting, autocast=False),
        "step-transformers-bf16": lambda: transformers_step(setting, autocast=True),
        "step-electra-pytorch-fp32": lambda: electra_pytorch_step(setting, autocast=False),
        "step-electra-pytorch-bf16": lambda: electra_pytorch_step(setting, autocast=True),
        "step-plain-loop": lambda: plain_loop(setting),
        "step-matrix-products": lambda: matrix_products(setting),
    }
    peer = peers[name]()
    return our_step(setting), peer


def alternate(ours: Action, peer: Action, repeats: int, device: torch.device) -> Iterator[tuple[float, float]]:
    """Seconds of each, in turns, after two rounds of warm-up."""

    def seconds(action: Action) -> float:
        if isinstance(action, Prepared):
            action.prepare()
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for number in range(repeats + 2):
        pair = seconds(ours), seconds(peer)
        if number >= 2:
            yield pair


def summarise(row: str, pairs: list[tuple[float, float]]) -> Result:
    """Medians, and quartiles of the paired ratios (above 1: ours is faster)."""
    ratios = sorted(peer / ours for ours, peer in pairs)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ours, peer = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    return Result(row, ROWS[row][0], ours, peer, statistics.median(ratios), (low, high))


def main() -> None:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="peer-small", metavar="NAME", help="preset (default: %(default)s)")
    parser.add_argument("--batch", **of(PositiveInt), default=32)
    parser.add_argument("--seq-length", **of(SeqLength), default=128)
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--repeats", **of(PositiveInt), default=5)
    parser.add_argument("--threads", **of(PositiveInt), help="of the CPU (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes instead")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = init_process_group(ProcessEnvironment(0, 1, 0, 1, "127.0.0.1", 0, "none"))
    if device.type == "cpu":
        keep_freed_memory()
    sizes = ["--micro-batch-size", str(args.batch), "--global-batch-size", str(args.batch)]
    flags = ["--model", args.model, "--bf16", *sizes, "--seq-length", str(args.seq_length)]
    run = resolve(build_parser().parse_args(flags), 1)
    setting = Setting(run, build_topology(device), synthetic_batch(run, device))
    if args.profile:
        profile_step(setting)
        return
    results = []
    for row in args.rows:
        try:
            results.append(measure(row, setting, args.repeats))
            print(describe(results[-1]), flush=True)
        except MissingPeer as missing:
            print(f"{row:<26} left out: {missing}")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


def measure(row: str, setting: Setting, repeats: int) -> Result:
    """Build a row's pair, time it, and see what memory each side needs."""
    run, device = setting.run, setting.topology.device
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = build_row(row, setting, Path(folder))
        result = summarise(row, list(alternate(ours, peer, repeats, device)))
        result = replace(result, ours_mib=memory_of(ours, device), peer_mib=memory_of(peer, device))
    if not ROWS[row][1]:
        return result
    batch, seq_length = run.training.micro_batch_size, run.training.seq_length
    flops = actual_train_flops(run.model, run.objective, run.sample_size, samples=batch)
    peak, seconds = bf16_peak(device), result.ours_ms / 1e3
    share = flops / seconds / peak if peak else None
    return replace(result, tokens_per_second=batch * seq_length / seconds, share_of_peak=share)


@functools.cache
def bf16_peak(device: torch.device) -> float | None:
    """FLOP/s at best: known of common GPUs, measured once on the CPU."""
    if device.type == "cuda":
        return peak_flops(torch.cuda.get_device_name(), torch.bfloat16)
    return measure_peak_flops(torch.bfloat16, 2.0)


def memory_of(action: Action, device: torch.device) -> float | None:
    """MiB that a call needs beyond what is there before it."""
    if isinstance(action, Prepared):
        action.prepare()
    size = working_memory(action, device)
    return None if size is None else size / 2**20


def describe(result: Result) -> str:
    """A row of the table."""
    low, high = result.quartiles
    parts = [
        f"{result.row:<26} ours {result.ours_ms:9.1f} ms",
        f"peer {result.peer_ms:9.1f} ms",
        f"ratio {result.ratio:5.2f} ({low:.2f}-{high:.2f})",
    ]
    if result.ours_mib is not None and result.peer_mib is not None:
        parts.append(f"memory {result.ours_mib:7,.0f} and {result.peer_mib:7,.0f} MiB")
    parts.append(result.peer)
    if result.tokens_per_second is not None:
        parts.append(f"{result.tokens_per_second:,.0f} tokens/s")
    if result.share_of_peak is not None:
        parts.append(f"{result.share_of_peak:.1%} of the bf16 peak")
    return "  ".join(parts)


def profile_step(setting: Setting) -> None:
    """Where the milliseconds of our step go."""
    from torch.profiler import ProfilerActivity, profile

    step = our_step(setting)
    for _ in range(3):
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setting.topology.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        step()
    key = "self_cuda_time_total" if setting.topology.device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=50))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
