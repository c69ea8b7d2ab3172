#!/usr/bin/env python3
"""Speed against named peers, in turns with them: the table of ratios.

python tools/bench.py                                  # peer-small, 32 x 128 tokens, bf16
python tools/bench.py --rows head-forward step-plain-loop --repeats 9 --json bench.json
python tools/bench.py --rows text-512-transformers-fp32 prepare-jsonl-2

Rows step-*, head-* and kernel-* are of full sequences, without padding. Rows text-* are training steps on Wikipedia
introductions, of at most so many tokens: the peers pad them to that length or, -longest-, to the longest of each batch.
Rows block-* are forward and backward of an encoder of other blocks and of transformers' class of the same sizes, both
without dropout and with weights in bf16 or, -fp32, in fp32: on full sequences or, -text, on introductions of at most
128 tokens.
Rows prepare-* compare tools/preprocess_data.py on so many workers with the tokenizer alone on as many threads.
Other people's training steps run in processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peer_scale.quiet import silence_libraries

silence_libraries()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pydantic import PositiveInt  # noqa: E402
from torch import Tensor  # noqa: E402

from bench_blocks import our_pass, their_pass  # noqa: E402
from bench_peers import PEERS, MissingPeer, Setting, matrix_products, our_task, padded, plain_loop  # noqa: E402
from bench_preparation import preparation_pair  # noqa: E402
from bench_processes import peer_step  # noqa: E402
from bench_text import text_batches  # noqa: E402
from bench_turns import Action, Here, measured, over_batches  # noqa: E402
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
from peer_scale.samples.examples import Batch, Example, collate  # noqa: E402
from peer_scale.settings.arguments import Parser, of  # noqa: E402
from peer_scale.settings.flags import build_parser  # noqa: E402
from peer_scale.settings.resolve import resolve  # noqa: E402
from peer_scale.settings.run import RunConfig, SeqLength  # noqa: E402
from peer_scale.training.engine import build_engine  # noqa: E402
from peer_scale.training.metering import Meter  # noqa: E402
from peer_scale.training.runner import WholeModelRunner  # noqa: E402
from peer_scale.training.trainer import Trainer  # noqa: E402
from peer_scale.training.update_guard import UpdateGuard  # noqa: E402


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
    tokens_per_second: float | None = None  # that are not padding
    share_of_peak: float | None = None


def synthetic_batch(run: RunConfig, device: torch.device) -> Batch:
    """Full sequences of random tokens: what is timed does not depend on which."""
    generator = np.random.default_rng(0)
    size, seq_length = run.training.micro_batch_size, run.training.seq_length
    num_predictions = run.masking.num_predictions(seq_length)

    def example() -> Example:
        ids = generator.integers(5, run.model.vocab_size, seq_length)
        positions = np.sort(generator.permutation(seq_length)[:num_predictions])
        masked_ids = ids.copy()
        masked_ids[positions] = 4
        shape = (num_predictions, run.objective.num_extra_uniforms)
        uniforms, extra_uniforms = generator.random(num_predictions, np.float32), generator.random(shape, np.float32)
        return Example(ids, masked_ids, np.zeros_like(ids), positions, uniforms, extra_uniforms)

    return collate([example() for _ in range(size)]).to(device)


def our_step(setting: Setting) -> Callable[[], object]:
    """The trainer's own step: DeepSpeed with ZeRO-2."""
    return our_trainer(setting)[1]


def our_trainer(setting: Setting) -> tuple[Any, Callable[[], object]]:
    """DeepSpeed's engine, and the trainer's own step with it over the batches in turns."""
    engine = build_engine(our_task(setting), setting.run, setting.topology)
    UpdateGuard(engine, goes_on=False)
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
    return engine, over_batches(lambda batch: trainer.train_step(1, [batch]), setting.batches)


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

    device = setting.topology.device
    ours = Here(save, device, before=writer.finish) if copy_alone else Here(step, device, before=begin)
    return ours, Here(step, device, before=writer.finish)


def head_pair(setting: Setting, *, backward: bool) -> tuple[Callable[[], object], Callable[[], object]]:
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


def kernel_pair(setting: Setting, name: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """A fused kernel and torch's composition, forward and backward."""
    shape = setting.run.model.generator
    width = shape.ffn_hidden_size if name == "gelu" else shape.hidden_size
    tokens, device = setting.batch.sequences.num_tokens, setting.topology.device
    x, residual, grad = (torch.randn(tokens, width, device=device).bfloat16() for _ in range(3))
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


@dataclass(frozen=True)
class Row:
    """What a row compares our side with.

    Attributes:
        peer: what stands in the table.
        is_step: whether our side is a whole training step.
        text_length: of a row on real text, the longest sequence.
    """

    peer: str
    is_step: bool = True
    text_length: int | None = None


def _text_rows(length: int) -> dict[str, Row]:
    rows = {}
    for precision, how in (("fp32", "fp32"), ("bf16", "bf16 autocast")):
        for name, peer in (
            ("transformers", f"transformers, padded to {length}"),
            ("longest", "transformers, padded to the longest of the batch"),
            ("electra-pytorch", f"electra-pytorch around them, padded to {length}"),
        ):
            rows[f"text-{length}-{name}-{precision}"] = Row(f"{peer}, {how}", text_length=length)
    rows[f"text-{length}-full"] = Row(f"the same step on sequences that are all {length} long", text_length=length)
    return rows


def _block_rows() -> dict[str, Row]:
    blocks = {
        "modernbert": Row("transformers' ModernBertModel, sdpa", is_step=False),
        "t5-bias": Row("transformers' T5EncoderModel: one table of biases, not one per layer", is_step=False),
        "modernbert-text": Row(
            "transformers' ModernBertModel, sdpa, padded to the longest of the batch", is_step=False, text_length=128
        ),
    }
    return {
        f"block-{name}{suffix}": replace(row, peer=f"{row.peer}, both {precision}")
        for name, row in blocks.items()
        for suffix, precision in (("", "bf16"), ("-fp32", "fp32"))
    }


ROWS: dict[str, Row] = {
    "step-transformers-fp32": Row("transformers, tied and shared, fp32"),
    "step-transformers-bf16": Row("transformers, tied and shared, bf16 autocast"),
    "step-electra-pytorch-fp32": Row("electra-pytorch around them, fp32"),
    "step-electra-pytorch-bf16": Row("electra-pytorch around them, bf16 autocast"),
    "step-plain-loop": Row("our model without DeepSpeed"),
    "step-matrix-products": Row("the bare matrix products"),
    "step-while-saving": Row("the same step while nothing is saved"),
    "save-copy": Row("a step: what a background save holds training up for", is_step=False),
    "head-forward": Row("the bare product of the logits", is_step=False),
    "head-backward": Row("its three products", is_step=False),
    "kernel-norm": Row("torch's composition", is_step=False),
    "kernel-gelu": Row("torch's composition", is_step=False),
    **_block_rows(),
    **_text_rows(128),
    **_text_rows(512),
    **{
        f"prepare-{kind}-{workers}": Row(f"tokenizers' encode_batch, threads: {workers}", is_step=False)
        for kind in ("text", "jsonl")
        for workers in (1, 2)
    },
}


@dataclass(frozen=True)
class Bench:
    """What the command line asks for.

    Attributes:
        flags: of the trainer, but for the length of sequences.
        seq_length: of the full sequences.
        folder: for files that rows share.
        device: what is computed on.
        copies: how often the introductions stand in the text that is prepared.
    """

    flags: list[str]
    seq_length: int
    folder: Path
    device: torch.device
    copies: int = 6

    def setting(self, text_length: int | None) -> Setting:
        """Return full sequences, or the introductions in sequences of at most `text_length`."""
        flags = [*self.flags, "--seq-length", str(text_length or self.seq_length)]
        if text_length is None:
            run = resolve(build_parser().parse_args(flags), 1)
            return Setting(run, build_topology(self.device), (synthetic_batch(run, self.device),))
        run, batches = text_batches(flags, self.folder)
        return Setting(run, build_topology(self.device), tuple(batch.to(self.device) for batch in batches))


def build_row(name: str, bench: Bench, setting: Setting, folder: Path) -> tuple[Action, Action]:
    """Ours and the peer's, ready to be called; `folder` is for the row's files."""
    kind, _, rest = name.partition("-")
    device = setting.topology.device
    if name in ("step-while-saving", "save-copy"):
        return saving_pair(setting, folder, copy_alone=name == "save-copy")
    if kind == "block":
        return block_pair(rest, setting)
    if kind == "prepare":
        source, workers = rest.split("-")
        return preparation_pair(source, int(workers), setting.run.model.vocab_size, bench.copies, bench.folder)
    if kind in ("head", "kernel"):
        pair = head_pair(setting, backward=rest == "backward") if kind == "head" else kernel_pair(setting, rest)
        return Here(pair[0], device), Here(pair[1], device)
    peer = foreign_step(rest.removeprefix(f"{ROWS[name].text_length}-"), setting)
    if peer is None:
        builders: dict[str, Callable[[], Callable[[], object]]] = {
            "plain-loop": lambda: plain_loop(setting),
            "matrix-products": lambda: matrix_products(setting),
            "128-full": lambda: our_step(replace(setting, batches=(synthetic_batch(setting.run, device),))),
        }
        builders["512-full"] = builders["128-full"]
        peer = Here(builders[rest](), device)
    return Here(our_step(setting), device), peer


def foreign_step(name: str, setting: Setting) -> Action | None:
    """Start another's training step, named "peer-precision", on the same batches; None where the name is no such."""
    peer, _, precision = name.rpartition("-")
    if precision not in ("fp32", "bf16"):
        return None
    length = None if peer == "longest" else setting.run.training.seq_length
    batches = [padded(batch, length) for batch in setting.batches]
    peer = "transformers" if peer == "longest" else peer
    device = setting.topology.device
    return peer_step(functools.partial(PEERS[peer], setting.run, device, precision == "bf16"), batches, device)


def block_pair(name: str, setting: Setting) -> tuple[Action, Action]:
    """Our encoder of other blocks and transformers', named "block", "block-text", or so with "-fp32"."""
    dtype = torch.float32 if name.endswith("-fp32") else torch.bfloat16
    block, device = name.removesuffix("-fp32").removesuffix("-text"), setting.topology.device
    batches = [padded(batch, None) for batch in setting.batches]
    peer = peer_step(functools.partial(their_pass, block, setting.run.model, device, dtype), batches, device)
    return Here(our_pass(block, setting, dtype), device), peer


def summarise(row: str, pairs: list[tuple[float, float]]) -> Result:
    """Medians, and quartiles of the paired ratios (above 1: ours is faster)."""
    ratios = sorted(peer / ours for ours, peer in pairs)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ours, peer = (statistics.median(times) * 1e3 for times in zip(*pairs, strict=True))
    return Result(row, ROWS[row].peer, ours, peer, statistics.median(ratios), (low, high))


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
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(["--model", args.model, "--bf16", *sizes], args.seq_length, Path(folder), device)
        if args.profile:
            profile_step(bench.setting(None))
            return
        for row in args.rows:
            try:
                results.append(measure(row, bench, args.repeats))
                print(describe(results[-1]), flush=True)
            except MissingPeer as missing:
                print(f"{row:<26} left out: {missing}")
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


def measure(row: str, bench: Bench, repeats: int) -> Result:
    """Build a row's pair, time it, and see what memory each side needs."""
    setting = bench.setting(ROWS[row].text_length)
    with tempfile.TemporaryDirectory() as folder:
        ours, peer = build_row(row, bench, setting, Path(folder))
        try:
            pairs, *sizes = measured(ours, peer, repeats)
        finally:
            ours.close()
            peer.close()
    ours_mib, peer_mib = (None if size is None else size / 2**20 for size in sizes)
    result = replace(summarise(row, pairs), ours_mib=ours_mib, peer_mib=peer_mib)
    if not ROWS[row].is_step:
        return result
    # the calls took the batches in turns, from the second on
    counts = [setting.batches[number % len(setting.batches)].sequences.num_tokens for number in range(1, repeats + 1)]
    speed = statistics.median(count / ours_s for count, (ours_s, _) in zip(counts, pairs, strict=True))
    result = replace(result, tokens_per_second=speed)
    if ROWS[row].text_length is not None:
        return result
    run, peak = setting.run, bf16_peak(bench.device)
    flops = actual_train_flops(run.model, run.objective, run.sample_size, samples=run.training.micro_batch_size)
    return replace(result, share_of_peak=flops / (result.ours_ms / 1e3) / peak if peak else None)


@functools.cache
def bf16_peak(device: torch.device) -> float | None:
    """FLOP/s at best: known of common GPUs, measured once on the CPU."""
    if device.type == "cuda":
        return peak_flops(torch.cuda.get_device_name(), torch.bfloat16)
    return measure_peak_flops(torch.bfloat16, 2.0)


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
