"""Linear probes of a model on tasks, as a program: `python -m peer_scale.experiments.probing --model DIR ...`.

DIR/results.json comes out as that of fine-tuning does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from peer_scale.errors import USER_ERROR_EXIT_CODE, UserError
from peer_scale.quiet import silence_libraries
from peer_scale.settings.arguments import Parser, of
from peer_scale.storage import write_atomically

_RESULTS = "results.json"


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; its flags are the options of `probe` in an experiment's file."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder that transformers opens")
    parser.add_argument("--task", required=True, nargs="+", help="as for peer-scale finetune")
    parser.add_argument("--output-dir", required=True, type=Path, help="folder of results.json")
    parser.add_argument("--data-dir", type=Path, help="of GLUE's own files")
    parser.add_argument("--layers", choices=("last", "all"), default="last", help="whose states are read")
    parser.add_argument("--max-length", **of(PositiveInt), default=128, help="tokens of a text or pair")
    parser.add_argument("--max-train-examples", **of(PositiveInt), help="examples to fit to (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the examples that are drawn")
    return parser


def run(args: argparse.Namespace) -> None:
    """Probe the model on each task and write the results; UserError for a bad model or task."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, dict[str, Any]] = {}
    for name in args.task:
        tasks[name] = _probed(args, name)
        content = {"model": args.model, "recipe": "probe", "tasks": tasks}
        write_atomically(args.output_dir / _RESULTS, json.dumps(content, indent=1).encode())


def _probed(args: argparse.Namespace, name: str) -> dict[str, Any]:
    from peer_scale.finetuning.data import load_task
    from peer_scale.finetuning.probe import probe

    data = load_task(name, args.data_dir)
    size = args.max_train_examples
    is_all = size is None or size >= len(data.train)
    scores = [
        probe(
            args.model,
            data,
            layers=args.layers,
            seed=seed,
            max_train_examples=size,
            max_length=args.max_length,
        )
        for seed in (args.seeds[:1] if is_all else args.seeds)  # all examples are the same ones for each seed
    ]
    print(f"{name}: {data.task.metric} {statistics.fmean(scores):.4f}", flush=True)
    return {
        "metric": data.task.metric,
        "higher_is_better": True,
        "train_size": len(data.train) if is_all else size,
        "runs": [{"seed": seed, "score": value} for seed, value in zip(args.seeds, scores, strict=False)],
        "mean": statistics.fmean(scores),
        "std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "n": len(scores),
        "failed": 0,
        "scored_on": "test" if any(part.labels is not None for part in data.test.values()) else "dev",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Probe; give the exit code, 2 with a line on stderr for bad input."""
    silence_libraries()
    try:
        run(build_parser().parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
