"""Pre-train, fine-tune and compare arms at equal FLOPs, as a YAML file says; go on where an earlier call stopped."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from peer_scale.commands.outcome import exit_code
from peer_scale.errors import STOPPED_EXIT_CODE, TRAINING_ERROR_EXIT_CODE, StoppedEarly, UserError
from peer_scale.quiet import silence_libraries
from peer_scale.settings.arguments import Parser, of

if TYPE_CHECKING:
    from peer_scale.experiments.budget import Texts
    from peer_scale.experiments.config import ExperimentConfig
    from peer_scale.experiments.plan import Plan, RunName
    from peer_scale.experiments.run import Conductor

_EXAMPLE = """\
examples:
  peer-scale experiment examples/comparison.yaml --plan --measure-speed 20
  peer-scale experiment examples/comparison.yaml --jobs 2
  peer-scale experiment examples/paper/table3.yaml --plan --tokens-per-second 400000
  peer-scale experiment examples/paper/table3.yaml --output runs/table3 --slurm --sbatch '-N 1 --gpus-per-node 8'

Results of single runs are small files in results/ of the output folder. Copied into another machine's they count
there: what they are of is not run again, and experiment.json is made of all that is there.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of the command line; `prog` is what help and errors call the command."""
    parser = Parser(
        prog=prog, description=__doc__, epilog=_EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="the experiment")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of runs and results (default: experiments/NAME)"
    )
    parser.add_argument("--only", nargs="+", metavar="RUN", help="runs to do, as ARM or ARM-sSEED (default: all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="print steps, tokens, FLOPs and time, and run nothing")
    what.add_argument("--collect", action="store_true", help="make experiment.json of the results that are there")
    what.add_argument("--slurm", action="store_true", help="submit Slurm jobs: pre-training, and measuring behind it")
    plan = parser.add_argument_group("with --plan")
    plan.add_argument("--measure-speed", **of(PositiveInt), metavar="STEPS", help="train each arm so many steps first")
    plan.add_argument(
        "--tokens-per-second", nargs="+", metavar="X", help="speed of all arms, or ARM=X of one, instead of measuring"
    )
    here = parser.add_argument_group("on this machine")
    here.add_argument(
        "--jobs", **of(PositiveInt), default=1, metavar="N", help="runs at once, each on one thread if several"
    )
    here.add_argument(
        "--launcher", default="", metavar="COMMAND", help="what starts the trainer, as 'torchrun --nproc-per-node 8'"
    )
    slurm = parser.add_argument_group("with --slurm")
    slurm.add_argument("--sbatch", default="", metavar="OPTIONS", help="for sbatch, of the pre-training jobs")
    slurm.add_argument("--sbatch-measuring", default="", metavar="OPTIONS", help="for sbatch, of the measuring jobs")
    slurm.add_argument("--slurm-script", type=Path, metavar="FILE", help="default: slurm/base.sh of this checkout")
    slurm.add_argument("--dry-run", action="store_true", help="print the commands instead of submitting the jobs")
    return parser


def run(args: argparse.Namespace) -> bool:
    """Do what is asked; give whether all that was to be run came out well. UserError for bad input."""
    from peer_scale.experiments.plan import make_plan
    from peer_scale.experiments.processes import Programs
    from peer_scale.experiments.reading import read_experiment
    from peer_scale.experiments.run import Conductor

    _check_flags(args)
    config = read_experiment(args.file)
    plan = make_plan(config, args.file, _texts(args, config))
    folder = args.output or Path("experiments") / config.name
    programs = Programs(one_thread=args.jobs > 1)
    say = functools.partial(print, flush=True)
    conductor = Conductor(plan, folder, programs, shlex.split(args.launcher), say)
    wanted = _wanted(plan, args.only)
    if args.plan:
        _print_plan(args, conductor)
        return True
    if args.slurm:
        _submit(args, conductor, wanted)
        return True
    folder.mkdir(parents=True, exist_ok=True)
    failures = {} if args.collect else conductor.run_all(wanted, args.jobs)
    _print_comparison(conductor, failures)
    return not failures


def _print_plan(args: argparse.Namespace, conductor: Conductor) -> None:
    from peer_scale.experiments import speed
    from peer_scale.experiments.plan_table import plan_table
    from peer_scale.experiments.results import read_results

    plan = conductor.plan
    results = read_results(conductor.folder, plan)
    seconds = speed.from_results(results)
    if args.measure_speed is not None:
        seconds |= speed.measured(plan, conductor.programs, conductor.launcher, args.measure_speed)
    seconds |= speed.from_rates(plan, args.tokens_per_second or [])
    print(plan_table(plan, seconds, finished=results, jobs=args.jobs))


def _submit(args: argparse.Namespace, conductor: Conductor, wanted: Sequence[RunName]) -> None:
    from peer_scale.experiments.slurm import TEMPLATE, SlurmOptions, submit

    options = SlurmOptions(
        args.file,
        args.slurm_script or TEMPLATE,
        shlex.split(args.sbatch),
        shlex.split(args.sbatch_measuring),
        args.dry_run,
    )
    submit(conductor, wanted, options, conductor.say)


def _print_comparison(conductor: Conductor, failures: dict[RunName, str]) -> None:
    from peer_scale.experiments.comparison import FILE, sentence, table

    comparison = conductor.collect()
    print(f"\n{table(comparison)}\n\n{sentence(comparison)}")
    for run in comparison.missing:
        print(f"missing: {run}{': ' + failures[run].splitlines()[0] if run in failures else ''}")
    for run in comparison.incomplete:
        print(f"lacks a measure that was added later, and its model is not here: {run}")
    print(f"all of it: {conductor.folder / FILE}")


def _texts(args: argparse.Namespace, config: ExperimentConfig) -> Texts | None:
    """Give what opens the text; None where only a plan is asked for, and the text is not here."""
    from peer_scale.experiments.budget import Texts, missing_text

    missing = missing_text(config) if args.plan and args.measure_speed is None else None
    if missing is None:
        return Texts()
    print(f"notice: {missing} is not here: counted with the models' own vocabulary size and full sequences")
    return None


def _wanted(plan: Plan, only: Sequence[str] | None) -> Sequence[RunName]:
    """Give the runs that were asked for; UserError for one that is not in the plan."""
    from peer_scale.settings.names import hint

    if only is None:
        return plan.runs
    known: dict[str, list[RunName]] = {}
    for run in plan.runs:
        known.setdefault(run.arm, []).append(run)
        known[str(run)] = [run]
    for name in only:
        if name not in known:
            raise UserError(f"--only {name}: no such run{hint(name, known)}")
    chosen = {run for name in only for run in known[name]}
    return [run for run in plan.runs if run in chosen]


def _check_flags(args: argparse.Namespace) -> None:
    """Raise UserError for a flag that would have no effect."""
    goes_with = {
        "plan": ("measure_speed", "tokens_per_second"),
        "slurm": ("sbatch", "sbatch_measuring", "slurm_script", "dry_run"),
    }
    for what, names in goes_with.items():
        for name in names:
            if getattr(args, name) not in (None, "", False) and not getattr(args, what):
                raise UserError(f"--{name.replace('_', '-')} has no effect without --{what}")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Carry the experiment out; give the exit code: 1 where a run failed, 75 where it was stopped and can go on."""
    silence_libraries()
    came_out_well = True

    def body() -> None:
        nonlocal came_out_well
        came_out_well = run(build_parser(prog).parse_args(argv))

    try:
        code = exit_code(body)
    except StoppedEarly as stop:
        print(str(stop), file=sys.stderr)
        return STOPPED_EXIT_CODE
    return code if came_out_well else TRAINING_ERROR_EXIT_CODE
