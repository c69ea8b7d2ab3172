"""One self-contained HTML page of runs side by side, or of an experiment: tables, curves, origins of the numbers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peer_scale.commands.outcome import exit_code
from peer_scale.settings.arguments import Parser

_EXAMPLE = """\
examples:
  peer-scale report logs/peer-base
  peer-scale report logs/peer-s1 logs/peer-s2 logs/electra-s1 --output comparison.html
  peer-scale report experiments/equal-flops --title "PEER and ELECTRA at equal FLOPs"
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser = Parser(
        prog=prog, description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="--log-dir of a run, a folder that holds some, an experiment's folder, or one of fine-tuning results",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), metavar="FILE", help="to write (default: %(default)s)"
    )
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the run's or the experiment's name)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write the page and say where; give 0, 2 after bad input, or 130 after Ctrl-C."""

    def run() -> None:
        args = build_parser(prog).parse_args(argv)
        from peer_scale.reporting.build import write_report

        write_report(args.runs, args.output, args.title)
        print(args.output)

    return exit_code(run)
