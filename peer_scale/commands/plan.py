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
from peer_scale.quiet import silence_libraries
from peer_scale.settings.arguments import Parser, of
from peer_scale.settings.run import SeqLength

if TYPE_CHECKING:
    from peer_scale.planning.layout import Cluster, Workload
    from peer_scale.planning.lengths import Lengths

_EXAMPLE = """\
examples:
  peer-scale plan --model peer-base --nodes 1 --gpus-per-node 8 --micro-batch-size 32 --zero-stage 2
  peer-scale plan --model peer-large --nodes 32 --gpus-per-node 8 --gpu H100 --search --top 10
  peer-scale plan --model peer-large --config 3b.yaml --nodes 32 --gpus-per-node 8 --search
  peer-scale plan --model peer-base --nodes 4 --gpus-per-node 8 --search --data-path data/corpus
  peer-scale plan --model peer-base --nodes 4 --gpus-per-node 8 --search --measured doctor.json
"""
_GPU_NAMES = {"A100": "A100", "H100": "H100 80GB HBM3", "H200": "H200", "B200": "B200", "L40S": "L40S"}
_INTRA_BANDWIDTH, _INTER_BANDWIDTH = 300, 40
_Share = Annotated[float, Field(ge=0, le=1)]
_Fill = Annotated[float, Field(gt=0, le=1)]


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser = Parser(
        prog=prog, description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model, as for training")
    model.add_argument("--model", required=True, metavar="NAME", help="preset")
    model.add_argument("--config", metavar="YAML", help="own sizes: sections model, objective, training")
    model.add_argument("--seq-length", **of(SeqLength), metavar="N", help="default: the preset's")
    model.add_argument("--global-batch-size", **of(PositiveInt), metavar="N", help="default: the preset's")
    model.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    model.add_argument(
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
    machines = parser.add_argument_group("machines")
    machines.add_argument("--nodes", **of(PositiveInt), required=True, metavar="N")
    machines.add_argument("--gpus-per-node", **of(PositiveInt), required=True, metavar="G")
    machines.add_argument("--gpu", default="H100", help="sets the peak: a name that is known (default: %(default)s)")
    machines.add_argument("--peak-tflops", **of(PositiveFloat), metavar="T", help="per GPU, instead")
    machines.add_argument(
        "--memory", **of(PositiveFloat), default=80, metavar="GIB", help="per GPU (default: %(default)s)"
    )
    machines.add_argument(
        "--reserved",
        **of(NonNegativeFloat),
        default=4,
        metavar="GIB",
        help="per GPU, not to be used (default: %(default)s)",
    )
    machines.add_argument(
        "--intra-bandwidth",
        **of(PositiveFloat),
        metavar="GB/S",
        help=f"per GPU in a node (default: {_INTRA_BANDWIDTH})",
    )
    machines.add_argument(
        "--inter-bandwidth",
        **of(PositiveFloat),
        metavar="GB/S",
        help=f"per GPU between nodes (default: {_INTER_BANDWIDTH})",
    )
    machines.add_argument(
        "--efficiency",
        **of(_Share),
        default=0.5,
        metavar="SHARE",
        help="of the peak, in products (default: %(default)s)",
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
    layout.add_argument("--top", **of(PositiveInt), default=10, metavar="N", help="of --search (default: %(default)s)")
    for name, metavar in (("tensor", "T"), ("pipeline", "P")):
        layout.add_argument(f"--{name}-model-parallel-size", **of(PositiveInt), metavar=metavar, help="default: 1")
    layout.add_argument("--zero-stage", type=int, choices=(1, 2, 3), help="default: 2")
    layout.add_argument("--micro-batch-size", **of(PositiveInt), metavar="N", help="default: the preset's")
    layout.add_argument("--sequence-parallel", action="store_true")
    layout.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true", help="print plans as JSON lines")
    return parser


def run(args: argparse.Namespace) -> str:
    """Give the report; UserError for what cannot be planned."""
    import torch

    from peer_scale.flops import peak_flops
    from peer_scale.parallel.topology import check_parallel_sizes
    from peer_scale.planning.estimate import make_plan, search_plans
    from peer_scale.planning.layout import GIB, Cluster, ParallelLayout, Workload
    from peer_scale.planning.report import as_json, describe, table
    from peer_scale.settings.presets import find_preset
    from peer_scale.settings.resolve import with_yaml

    _check_text_flags(args)
    _check_layout_flags(args)
    preset = with_yaml(find_preset(args.model), Path(args.config) if args.config else None)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    peak = (
        args.peak_tflops * 1e12
        if args.peak_tflops is not None
        else peak_flops(_GPU_NAMES.get(args.gpu, args.gpu), dtype)
    )
    if peak is None:
        raise UserError(f"--gpu {args.gpu}: its peak is not known; give --peak-tflops")
    cluster = Cluster(
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        memory=args.memory * GIB,
        peak_flops=peak,
        intra_bandwidth=(args.intra_bandwidth or _INTRA_BANDWIDTH) * 1e9,
        inter_bandwidth=(args.inter_bandwidth or _INTER_BANDWIDTH) * 1e9,
        efficiency=args.efficiency,
        overlap=args.overlap,
        reserved=args.reserved * GIB,
    )
    if args.measured is not None:
        cluster = _as_measured(cluster, args)
    training = preset.training
    seq_length = training.seq_length if args.seq_length is None else args.seq_length
    batch = training.global_batch_size if args.global_batch_size is None else args.global_batch_size
    tokens = float(training.train_iters) * batch * seq_length if args.tokens is None else args.tokens
    workload = Workload(
        preset.model, preset.objective, preset.masking, seq_length, batch, tokens, precision=args.precision
    )
    workload = replace(workload, lengths=_lengths(args, workload))
    if args.tokens is None:
        workload = replace(workload, tokens=tokens * workload.fill)
    if args.search:
        plans = search_plans(workload, cluster)[: args.top]
        if args.json:
            return "\n".join(as_json(plan) for plan in plans)
        return f"{table(plans)}\n\nthe first in full\n\n{describe(plans[0], workload, cluster)}"
    sizes = (args.tensor_model_parallel_size or 1, args.pipeline_model_parallel_size or 1)
    layout = ParallelLayout(
        check_parallel_sizes(cluster.num_ranks, *sizes),
        *sizes,
        zero_stage=args.zero_stage or 2,
        micro_batch_size=training.micro_batch_size if args.micro_batch_size is None else args.micro_batch_size,
        sequence_parallel=args.sequence_parallel,
        activation_checkpointing=args.activation_checkpointing,
    )
    plan = make_plan(workload, cluster, layout)
    return as_json(plan) if args.json else describe(plan, workload, cluster)


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
    """Raise UserError for a flag that would have no effect."""
    layout = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "zero_stage", "micro_batch_size")
    given = [name for name in layout if getattr(args, name) is not None]
    given += [name for name in ("sequence_parallel", "activation_checkpointing") if getattr(args, name)]
    if args.search and given:
        raise UserError(f"--{given[0].replace('_', '-')} has no effect with --search, which tries all layouts")
    if args.sequence_parallel and (args.tensor_model_parallel_size or 1) == 1:
        raise UserError("--sequence-parallel needs --tensor-model-parallel-size of 2 or more")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print the report; give the exit code."""
    silence_libraries()
    return exit_code(lambda: print(run(build_parser(prog).parse_args(argv))))
