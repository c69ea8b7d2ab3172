"""What the job scripts need Python for: a setting of a YAML file, a layout from the planner, a run's summary.

python slurm/job.py setting FILE save              the folder that FILE names in its section "output"
python slurm/job.py layout NODES GPUS [flags]      flags of the best layout for training with these flags
python slurm/job.py summary FILE                   a run's summary.json as a few lines
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parent.parent
# what the planner's search decides, or what would have it read the text
_NOT_FOR_THE_PLANNER = ("micro_batch_size", "micro_batch_tokens", "data_path", "tokenizer", "text_key")


def setting(file: str, name: str) -> str:
    """Give a value of the section `output`; nothing where there is none, or no such file, which training will say."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    section = content.get("output") if isinstance(content, dict) else None
    value = section.get(name) if isinstance(section, dict) else None
    return "" if value is None else str(value)


def layout(nodes: str, gpus_per_node: str, flags: list[str]) -> str:
    """Give the flags of the layout that the planner finds best for what `flags` train; UserError for bad ones.

    The kind of GPU is that of PEER_GPU, or that of this machine where the planner knows it.
    """
    from peer_scale.commands import plan
    from peer_scale.settings import flags as trainer

    trained = trainer.build_parser().parse_args(flags)
    machines = [
        "--nodes",
        nodes,
        "--gpus-per-node",
        gpus_per_node,
        "--gpu",
        os.environ.get("PEER_GPU") or _kind_of_gpu(),
    ]
    asked = plan.build_parser().parse_args([*machines, "--search", "--top", "1", "--json"])
    for name, value in vars(trained).items():
        if value is not None and hasattr(asked, name) and name not in _NOT_FOR_THE_PLANNER:
            setattr(asked, name, value)
    return _as_flags(json.loads(plan.run(asked))["layout"])


def _as_flags(found: dict[str, Any]) -> str:
    switches = [name for name in ("sequence_parallel", "activation_checkpointing") if found[name]]
    words = [
        *("--deepspeed_config", f"zero{found['zero_stage']}"),
        *("--tensor-model-parallel-size", str(found["tensor_parallel"])),
        *("--pipeline-model-parallel-size", str(found["pipeline_parallel"])),
        *("--micro-batch-size", str(int(found["micro_batch_size"]))),
        *(f"--{name.replace('_', '-')}" for name in switches),
    ]
    return " ".join(words)


def _kind_of_gpu() -> str:
    """Give the planner's name of the first GPU here; UserError where it is not known."""
    from peer_scale.errors import UserError
    from peer_scale.planning.gpus import GPUS

    try:
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
        first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        name, memory = first.rsplit(",", 1)
        gib = float(memory) / 1024
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        raise UserError(f"nvidia-smi names no GPU here; set PEER_GPU to one of {', '.join(GPUS)}") from None
    known = [kind for kind, gpu in GPUS.items() if kind.partition("-")[0] in name and abs(gpu.memory - gib) < 8]
    if not known:
        raise UserError(f"the planner does not know {first!r}; set PEER_GPU to the nearest of {', '.join(GPUS)}")
    return known[0]


def summary(file: str) -> str:
    """Give what a run has done over all its starts, as aligned lines."""
    told: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    wall, steps, restarts = told["wall_s"], told["steps"], told.get("restarts", 0)
    lines = {
        "run": f"{steps:,} steps, {told['tokens']:,} tokens, {told['train_flops']:.3g} FLOPs in {wall / 3600:.2f} h",
        "starts": f"{restarts} restarts" if restarts != 1 else "1 restart",
    }
    speed = [f"{told['tokens_per_second']:,.0f} tokens/s"] if told.get("tokens_per_second") else []
    speed += [f"{told['tflops_per_device']:.3g} TFLOP/s per device"] if told.get("tflops_per_device") else []
    speed += [f"MFU {told['mfu']:.1%}"] if told.get("mfu") else []
    if speed:
        lines["throughput"] = ", ".join(speed)
    if told.get("goodput") is not None:
        parts = sorted(told.get("parts_s", {}).items(), key=lambda part: -part[1])
        lost = [
            f"{name} {seconds / wall:.1%}" for name, seconds in parts if name != "train" and seconds > 0 and wall > 0
        ]
        lines["goodput"] = f"{told['goodput']:.1%} of the time" + (f"; {', '.join(lost)}" if lost else "")
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def main(arguments: list[str]) -> int:
    """Do what the first argument says; give the exit code."""
    sys.path.insert(0, str(CHECKOUT))
    command, *rest = arguments
    if command != "layout":
        print({"setting": setting, "summary": summary}[command](*rest))
        return 0
    from peer_scale.errors import USER_ERROR_EXIT_CODE, UserError

    try:
        print(layout(rest[0], rest[1], rest[2:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
