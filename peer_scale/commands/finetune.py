"""Fine-tune an encoder on GLUE or on own classification, pair or regression data, and report scores over seeds."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peer_scale.commands.outcome import exit_code
from peer_scale.configuration import values
from peer_scale.errors import UserError
from peer_scale.finetuning.config import FinetuneConfig
from peer_scale.quiet import silence_libraries
from peer_scale.settings.arguments import Parser
from peer_scale.settings.flags import add_flags, given

if TYPE_CHECKING:
    from peer_scale.finetuning.results import Results

_EXAMPLE = """\
examples:
  peer-scale finetune --model runs/small --task cola mrpc rte --data-dir GLUE --output-dir glue/small
  peer-scale finetune --model hf/ranker --task glue --data-dir GLUE --recipe electra --output-dir glue/ranker
  peer-scale finetune --model runs/small --train-file reviews.jsonl --output-dir reviews
  torchrun --nproc-per-node 8 -m peer_scale.finetune --model runs/small --task mnli --data-dir GLUE --output-dir mnli

Run it again to go on: runs that are done are kept. DIR/results.json holds all scores, DIR/TASK/model the best run's
model, DIR/TASK/predictions the files for GLUE's test server.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser = Parser(
        prog=prog, description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, FinetuneConfig)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # of older launchers
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Fine-tune; give the exit code."""
    return exit_code(lambda: _run(argv, prog), interrupted="interrupted; the same command goes on")


def _run(argv: Sequence[str] | None, prog: str | None) -> None:
    args = build_parser(prog).parse_args(argv)
    told = values(given(args, FinetuneConfig))
    for name in ("model", "output_dir"):
        if name not in told:
            raise UserError(f"--{name.replace('_', '-')} is missing (see --help)")
    config = FinetuneConfig(**told)
    silence_libraries()
    from peer_scale.finetuning.ranks import is_first_rank
    from peer_scale.finetuning.run import finetune

    results = finetune(config, lambda line: print(line, flush=True))
    if is_first_rank():
        print(_table(results))
        print(f"results: {config.output_dir / 'results.json'}")


def _table(results: Results) -> str:
    """Lay out a line per task: mean and deviation over the seeds, median, max, failed runs."""
    heads = ("task", "metric", "on", "lr", "mean", "std", "median", "max", "failed")
    rows = []
    for name, task in results.tasks.items():
        scores = task.scores
        std = statistics.stdev(scores) if len(scores) > 1 else 0.0
        numbers = [f"{100 * value:.2f}" for value in (task.mean, std, statistics.median(scores), max(scores))]
        rows.append((name, task.metric, task.scored_on, f"{task.lr:g}", *numbers, f"{task.failed} of {len(scores)}"))
    if len(rows) > 1 and results.average is not None:
        rows.append(("average", "", "", "", f"{100 * results.average:.2f}", "", "", "", ""))
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(line.rstrip() for line in lines)
