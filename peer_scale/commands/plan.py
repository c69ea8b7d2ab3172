"""Memory, communication, bubble and time of a layout, before a job is queued; or all layouts, best first."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from peer_scale.commands.outcome import exit_code
from peer_scale.errors import UserError
from peer_scale.planning.gpus import GPUS
from peer_scale.quiet import silence_libraries
from peer_scale.settings.arguments import Parser, of
from peer_scale.settings.flags import add_model_flags
from peer_scale.settings.run import SeqLength

if TYPE_CHECKING:
    from peer_scale.planning.layout import Cluster, ParallelLayout, Workload
    from peer_scale.planning.lengths import Lengths
    from peer_scale.settings.presets import Preset

_EXAMPLE = """\
examples:
  peer-scale plan --model peer-base --nodes 1 --gpus-per-node 8 --micro-batch-size 32 --zero-stage 2
  peer-scale plan --model peer-large --nodes 32 --gpus-per-node 8 --gpu H100 --search --top 10
  peer-scale plan --model peer-large --config 3b.yaml --nodes 32 --gpus-per-node 8 --search
  peer-scale plan --model peer-base --nodes 4 --gpus-per-node 8 --search --data-path data/corpus
  peer-scale plan --model peer-base --nodes 4 --gpus-per-node 8 --search --measured doctor.json
  peer-scale plan --roofline
"""
_ROOFLINE_MODELS = ("peer-small", "peer-base", "peer-large")
_ROOFLINE_GPUS = ("A100", "H100")
_ROOFLINE_SIZES = (1, 8, 64)
_Share = Annotated[float, Field(ge=0, le=1)]
_Fill = Annotated[float, Field(gt=0, le=1)]


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser = Parser(
        prog=prog, description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model, as for training")
    add_model_flags(model)
    training = parser.add_argument_group("training")
    training.add_argument("--seq-length", **of(SeqLength), metavar="N", help="default: the preset's")
    training.add_argument("--global-batch-size", **of(PositiveInt), metavar="N", help="default: the preset's")
    training.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    training.add_argument("--compile", action="store_true", help="layers run under torch.compile: fewer kernels")
    training.add_argument(
        "--tokens", **of(PositiveFloat), metavar="N", help="budget, without padding (default: the preset's train_iters)"
    )
    text = parser.add_argument_group("text, by which samples have their lengths (default: all are full)")
    text.add_argument("--data-path", nargs="+", metavar="P", help="as for training; raw text is tokenised first")
    text.add_argument("--tokenizer", metavar="P", help="of --data-path, as for training")
    text.add_argument("--text-key", metavar="KEY", help="of --data-path, as for training (default: text)")
    text.add_argument(
        "--fill",
        **of(_Fill),
        metavar="SHARE",
        help="mean tokens of a sample over --seq-length, without a text",
    )
    machines = parser.add_argument_group("machines (bandwidths: what is reached of the data sheet's figures)")
    machines.add_argument("--nodes", **of(PositiveInt), metavar="N")
    machines.add_argument("--gpus-per-node", **of(PositiveInt), metavar="G")
    machines.add_argument("--gpu", help=f"kind, which sets what is not given below: {', '.join(GPUS)} (default: H100)")
    machines.add_argument("--peak-tflops", **of(PositiveFloat), metavar="T", help="per GPU")
    machines.add_argument("--memory", **of(PositiveFloat), metavar="GIB", help="per GPU")
    machines.add_argument(
        "--reserved",
        **of(NonNegativeFloat),
        default=4,
        metavar="GIB",
        help="per GPU, not to be used (default: %(default)s)",
    )
    machines.add_argument("--memory-bandwidth", **of(PositiveFloat), metavar="GB/S", help="of a GPU's own memory")
    machines.add_argument("--intra-bandwidth", **of(PositiveFloat), metavar="GB/S", help="per GPU in a node")
    machines.add_argument("--inter-bandwidth", **of(PositiveFloat), metavar="GB/S", help="per GPU between nodes")
    machines.add_argument("--efficiency", **of(_Share), metavar="SHARE", help="of the peak, in large products")
    machines.add_argument(
        "--launch",
        **of(NonNegativeFloat),
        default=5,
        metavar="US",
        help="microseconds in which the host starts a kernel (default: %(default)s)",
    )
    machines.add_argument(
        "--overlap", **of(_Share), default=0.5, metavar="SHARE", help="of ZeRO's traffic, hidden (default: %(default)s)"
    )
    machines.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="report of peer-scale doctor, whose bandwidths and latency hold here",
    )
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--search", action="store_true", help="plan all layouts of up to 16 stages, best first; without the flags below"
    )
    layout.add_argument(
        "--roofline",
        action="store_true",
        help="table of what the time goes to: peer-small, -base and -large on 1, 8 and 64 A100 and H100, or --model on "
        "--gpu, each in its best layout",
    )
    layout.add_argument("--top", **of(PositiveInt), metavar="N", help="of --search (default: 10)")
    for name, metavar in (("tensor", "T"), ("pipeline", "P")):
        layout.add_argument(f"--{name}-model-parallel-size", **of(PositiveInt), metavar=metavar, help="default: 1")
    layout.add_argument("--zero-stage", type=int, choices=(1, 2, 3), help="default: 2")
    layout.add_argument("--micro-batch-size", **of(PositiveInt), metavar="N", help="default: the preset's")
    layout.add_argument(
        "--micro-batch-tokens", **of(PositiveInt), metavar="N", help="budget instead of a size, as for training"
    )
    layout.add_argument("--sequence-parallel", action="store_true")
    layout.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true", help="print plans as JSON lines")
    return parser


def run(args: argparse.Namespace) -> str:
    """Give the report; UserError for what cannot be planned."""
    from peer_scale.planning.estimate import make_plan, search_plans
    from peer_scale.planning.report import as_json, describe, table
    from peer_scale.settings.resolve import resolve_model

    _check_text_flags(args)
    _check_layout_flags(args)
    if args.roofline:
        return _roofline(args)
    preset = resolve_model(args)
    cluster = _cluster(args, args.gpu or "H100", args.nodes, args.gpus_per_node)
    if args.measured is not None:
        cluster = _as_measured(cluster, args)
    workload = _workload(args, preset)
    if args.search:
        plans = search_plans(workload, cluster)[: args.top or 10]
        if args.json:
            return "\n".join(as_json(plan) for plan in plans)
        return f"{table(plans)}\n\nthe first in full\n\n{describe(plans[0], workload, cluster)}"
    plan = make_plan(workload, cluster, _layout(args, preset, cluster))
    return as_json(plan) if args.json else describe(plan, workload, cluster)


def _roofline(args: argparse.Namespace) -> str:
    """Plan models on growing numbers of GPUs, each in its best layout, and tabulate what the time goes to."""
    from peer_scale.planning.estimate import search_plans
    from peer_scale.planning.report import Row, as_json, assumptions, roofline
    from peer_scale.settings.resolve import resolve_model

    rows, assumed = [], []
    for name in [args.model] if args.model else _ROOFLINE_MODELS:
        preset = resolve_model(argparse.Namespace(**{**vars(args), "model": name}))
        workload = _workload(args, preset)
        for gpu in [args.gpu] if args.gpu else _ROOFLINE_GPUS:
            for number in _ROOFLINE_SIZES:
                cluster = _cluster(args, gpu, max(1, number // 8), min(8, number))
                rows.append(Row(name, gpu, number, search_plans(workload, cluster)[0]))
                assumed.append(f"{gpu}: {assumptions(cluster)}")
    if args.json:
        return "\n".join(as_json(row.plan) for row in rows)
    of_largest = [text for row, text in zip(rows, assumed, strict=True) if row.num_gpus == _ROOFLINE_SIZES[-1]]
    return "\n".join([roofline(rows), "", *dict.fromkeys(of_largest)])


def _cluster(args: argparse.Namespace, gpu: str, nodes: int, gpus_per_node: int) -> Cluster:
    """Give the machines; UserError where a figure of the GPU is neither known nor given."""
    import torch

    from peer_scale.flops import peak_flops
    from peer_scale.planning.gpus import LINK_SHARE, MEMORY_SHARE
    from peer_scale.planning.layout import GIB, Cluster

    known = GPUS.get(gpu)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    peak = peak_flops(known.device_name if known else gpu, dtype)
    figures: dict[str, float] = {} if peak is None else {"peak_tflops": peak / 1e12}
    if known:
        figures |= {
            "memory": known.memory,
            "memory_bandwidth": known.memory_bandwidth * MEMORY_SHARE / 1e9,
            "intra_bandwidth": known.link * LINK_SHARE / 1e9,
            "inter_bandwidth": known.network * LINK_SHARE / 1e9,
        }
    names = ("peak_tflops", "memory", "memory_bandwidth", "intra_bandwidth", "inter_bandwidth")
    figures |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    missing = [f"--{name.replace('_', '-')}" for name in names if name not in figures]
    if missing:
        raise UserError(f"--gpu {gpu} is none of {', '.join(GPUS)}: give {', '.join(missing)}")
    of_products = known.products if known else Cluster.efficiency
    return Cluster(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        memory=figures["memory"] * GIB,
        peak_flops=figures["peak_tflops"] * 1e12,
        intra_bandwidth=figures["intra_bandwidth"] * 1e9,
        inter_bandwidth=figures["inter_bandwidth"] * 1e9,
        efficiency=of_products if args.efficiency is None else args.efficiency,
        overlap=args.overlap,
        launch=args.launch * 1e-6,
        reserved=args.reserved * GIB,
        memory_bandwidth=figures["memory_bandwidth"] * 1e9,
        attention=known.attention if known else Cluster.attention,
    )


def _workload(args: argparse.Namespace, preset: Preset) -> Workload:
    """Give what is trained, and for how many tokens."""
    from peer_scale.planning.layout import Workload

    training = preset.training
    seq_length = training.seq_length if args.seq_length is None else args.seq_length
    batch = training.global_batch_size if args.global_batch_size is None else args.global_batch_size
    tokens = float(training.train_iters) * batch * seq_length if args.tokens is None else args.tokens
    workload = Workload(
        preset.model,
        preset.objective,
        preset.masking,
        seq_length,
        batch,
        tokens,
        precision=args.precision,
        compiled=args.compile,
    )
    workload = replace(workload, lengths=_lengths(args, workload))
    return replace(workload, tokens=tokens * workload.fill) if args.tokens is None else workload


def _layout(args: argparse.Namespace, preset: Preset, cluster: Cluster) -> ParallelLayout:
    """Give the layout that the flags say; a budget of tokens is the flag's or the file's, unless a size is given."""
    from peer_scale.parallel.topology import check_parallel_sizes
    from peer_scale.planning.layout import ParallelLayout

    training = preset.training
    sizes = (args.tensor_model_parallel_size or 1, args.pipeline_model_parallel_size or 1)
    budget = training.micro_batch_tokens if args.micro_batch_tokens is None else args.micro_batch_tokens
    return ParallelLayout(
        check_parallel_sizes(cluster.num_ranks, *sizes),
        *sizes,
        zero_stage=args.zero_stage or 2,
        micro_batch_size=training.micro_batch_size if args.micro_batch_size is None else args.micro_batch_size,
        sequence_parallel=args.sequence_parallel,
        activation_checkpointing=args.activation_checkpointing,
        micro_batch_tokens=budget if args.micro_batch_size is None else None,
    )


def _as_measured(cluster: Cluster, args: argparse.Namespace) -> Cluster:
    """Give the cluster with what --measured has; UserError for a flag that would have no effect."""
    from peer_scale.planning.measured import Measured

    measured = Measured.read(args.measured)
    for name in ("intra_bandwidth", "inter_bandwidth"):
        if getattr(args, name) is not None and getattr(measured, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name):g} has no effect: --measured has another")
    return measured.put_into(cluster)


def _check_text_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that would have no effect."""
    if args.data_path and args.fill is not None:
        raise UserError(f"--fill {args.fill:g} has no effect with --data-path, whose samples have their own lengths")
    for name in ("tokenizer", "text_key"):
        if getattr(args, name) is not None and not args.data_path:
            raise UserError(f"--{name.replace('_', '-')} has no effect without --data-path")


def _lengths(args: argparse.Namespace, workload: Workload) -> Lengths | None:
    """Give the lengths of the text's samples, of those of a mean fill, or None: all are full."""
    from peer_scale.corpus.prepare import open_corpus
    from peer_scale.planning.lengths import Lengths
    from peer_scale.samples.examples import NUM_SPECIAL_TOKENS
    from peer_scale.samples.split import Part
    from peer_scale.samples.windows import Windows
    from peer_scale.settings.resolve import default_data

    if args.fill is not None:
        return Lengths.at_fill(args.fill, workload.seq_length)
    if not args.data_path:
        return None
    data = default_data(os.environ)
    store, _ = open_corpus(
        args.data_path,
        args.tokenizer,
        vocab_size=workload.model.vocab_size,
        text_key=args.text_key or data.text_key,
        cache_dir=data.cache_dir,
        workers=len(os.sched_getaffinity(0)),
        show_progress=True,
    )
    whole = Part(0, store.num_documents)
    return Lengths.of_text(Windows(store, whole, width=workload.seq_length - NUM_SPECIAL_TOKENS))


def _check_layout_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that is missing, or would have no effect."""
    layout = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "zero_stage",
        "micro_batch_size",
        "micro_batch_tokens",
    )
    given = [name for name in layout if getattr(args, name) is not None]
    given += [name for name in ("sequence_parallel", "activation_checkpointing") if getattr(args, name)]
    tries_all = "--roofline" if args.roofline else "--search"
    if args.roofline:
        given += [name for name in ("nodes", "gpus_per_node", "measured", "search", "top") if getattr(args, name)]
    else:
        missing = [name for name in ("model", "nodes", "gpus_per_node") if getattr(args, name) is None]
        if missing:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise UserError(f"the following arguments are required: {names} (see --help)")
    if (args.search or args.roofline) and given:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect with {tries_all}, which tries all layouts")
    if args.sequence_parallel and (args.tensor_model_parallel_size or 1) == 1:
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size of 2 or more")
    if args.micro_batch_size is not None and args.micro_batch_tokens is not None:
        raise UserError("--micro-batch-size and --micro-batch-tokens are two ways to say one thing: give one of them")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print the report; give the exit code."""
    silence_libraries()
    return exit_code(lambda: print(run(build_parser(prog).parse_args(argv))))
