"""Find out what works on this machine or cluster, before the first job."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveFloat, PositiveInt

import peer_scale
from peer_scale.commands.outcome import INTERRUPTED_EXIT_CODE
from peer_scale.errors import TRAINING_ERROR_EXIT_CODE, USER_ERROR_EXIT_CODE, UserError
from peer_scale.parallel.environment import ProcessEnvironment, detect_environment
from peer_scale.quiet import silence_libraries
from peer_scale.settings.arguments import Parser, of
from peer_scale.storage import require_writable_folder

if TYPE_CHECKING:
    from peer_scale.doctor.outcome import Outcome

_EXAMPLE = """\
examples:
  peer-scale doctor                      # a laptop, a login node, a machine with GPUs: it starts the ranks itself
  peer-scale doctor --only setup         # seconds
  torchrun --nnodes 2 --nproc-per-node 8 ... -m peer_scale.cli doctor   # a cluster; or srun peer-scale doctor
  peer-scale plan --model peer-base --nodes 2 --gpus-per-node 8 --search --measured doctor.json

It ends with a table of what passed, failed or could not be tried, and writes a report to attach to a bug report.
Exit code: 0 where all that was tried passed, 1 where something failed, 2 for bad input.
"""
_GROUPS = {
    "setup": "versions, devices, shared memory, disk, addresses, limits",
    "curves": "one GPU and every way of sharing a run among ranks, against one process on the CPU",
    "gpu": "overlap, what waits for the device, kernels, speed",
    "bandwidth": "messages between ranks, for peer-scale plan --measured",
}
_RANKS_ON_CPUS, _MOST_GPUS = 2, 8


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser = Parser(
        prog=prog, description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    told = "; ".join(f"{name}: {text}" for name, text in _GROUPS.items())
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(_GROUPS),
        default=list(_GROUPS),
        metavar="GROUP",
        help=f"groups of checks: {told}",
    )
    parser.add_argument(
        "--report", type=Path, default=Path("doctor.json"), metavar="FILE", help="to write (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), metavar="DIR", help="where checkpoints are to go (default: here)"
    )
    parser.add_argument(
        "--ranks",
        **of(PositiveInt),
        metavar="N",
        help=f"to start on this machine (default: one per GPU, at most {_MOST_GPUS}; {_RANKS_ON_CPUS} without GPUs)",
    )
    parser.add_argument(
        "--steps", **of(PositiveInt), default=20, metavar="N", help="of each curve (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout",
        **of(PositiveFloat),
        default=300.0,
        metavar="SECONDS",
        help="after which a trial counts as hanging (default: %(default)g)",
    )
    parser.add_argument(
        "--shared-memory", type=Path, default=Path("/dev/shm"), metavar="DIR", help="to check (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the checks; give 0, 1 where one has failed, 2 after bad input, 130 after Ctrl-C."""
    rank = 0
    try:
        environment = detect_environment(os.environ)
        rank = environment.rank
        args = build_parser(prog).parse_args(argv)
        silence_libraries()
        given = list(sys.argv[1:] if argv is None else argv)
        outcomes = _examine(args, environment, given)
    except UserError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    # one of the processes is enough to say so: launchers make a fuss about each
    has_failed = rank == 0 and any(outcome.state == "failed" for outcome in outcomes)
    return TRAINING_ERROR_EXIT_CODE if has_failed else 0


def _examine(args: argparse.Namespace, environment: ProcessEnvironment, given: list[str]) -> list[Outcome]:
    import torch

    from peer_scale.doctor.crew import Crew
    from peer_scale.doctor.curves import ShortRun
    from peer_scale.doctor.examination import Examination
    from peer_scale.doctor.report import print_table, write_report

    if environment.launcher != "none" and args.ranks is not None:
        raise UserError(f"--ranks {args.ranks} has no effect: {environment.launcher} has started the ranks")
    if environment.rank == 0:
        require_writable_folder(args.report.absolute().parent, "--report")
    num_gpus = torch.cuda.device_count()
    ranks = args.ranks or (min(num_gpus, _MOST_GPUS) or _RANKS_ON_CPUS)
    if num_gpus and ranks > num_gpus and environment.launcher == "none":
        raise UserError(f"--ranks {ranks}: there are {num_gpus} GPUs, and a rank takes one of its own")
    begin = time.monotonic()
    before = signal.signal(signal.SIGTERM, _leave)
    scratch = Path(tempfile.mkdtemp(prefix="peer-scale-doctor-"))
    crew = None
    try:
        crew = Crew(environment, scratch, ranks=ranks, num_gpus=num_gpus, timeout=args.timeout)

        def tell(outcome: Outcome) -> None:
            if environment.rank == 0:
                seconds = time.monotonic() - begin
                print(
                    f"{seconds:5.0f} s  {outcome.group}: {outcome.name}: {outcome.state}", file=sys.stderr, flush=True
                )

        examination = Examination(
            crew,
            ShortRun(scratch, steps=args.steps, ranks=crew.num_ranks),
            environ=os.environ,
            host=socket.gethostname(),
            local_rank=environment.local_rank,
            folder=args.folder,
            shared_memory=args.shared_memory,
            bench=Path(peer_scale.__file__).resolve().parent.parent / "tools" / "bench.py",
            tell=tell,
        )
        outcomes = examination.run(args.only)
        if environment.rank == 0:
            bandwidth = examination.bandwidth
            write_report(args.report, outcomes, bandwidth=bandwidth, environ=os.environ, arguments=given)
            print_table(outcomes)
            print(f"report: {args.report}")
        crew.exchange(None)  # a launcher ends all processes when one of them ends
    finally:
        if crew is not None:
            crew.close()
        shutil.rmtree(scratch, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
    return outcomes


def _leave(*_: object) -> None:
    """End by an exception, so that the ranks are ended too."""
    sys.exit(128 + signal.SIGTERM)
