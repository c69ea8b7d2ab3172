"""One rank of a trial: `python -m peer_scale.doctor.rank TRIAL RESULT`, started by the crew."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from peer_scale.parallel.environment import detect_environment
from peer_scale.quiet import silence_libraries
from peer_scale.storage import write_atomically


def main(task: str, result: str) -> int:
    """Run the trial that the file describes; write its value, or what it raised, into the other file."""
    faulthandler.register(signal.SIGUSR2)
    silence_libraries()
    trial = json.loads(Path(task).read_text(encoding="utf-8"))
    try:
        written: dict[str, Any] = {"value": _run(trial)}
    except BaseException as error:
        traceback.print_exc()
        what = f"rank {os.environ['RANK']}: {type(error).__name__}: {_message(error)}{_place(error)}"
        written = {"error": what, "when": time.time()}
    write_atomically(Path(result), json.dumps(written).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    # a communicator whose peer has failed may never be torn down
    os._exit(1 if "error" in written else 0)


def _run(trial: dict[str, Any]) -> Any:
    from peer_scale.doctor.trials import TRIALS
    from peer_scale.parallel.topology import init_process_group

    environment = detect_environment(os.environ)
    device = init_process_group(environment, timeout_minutes=5.0)
    value = TRIALS[trial["kind"]](device, trial["flags"], **trial["options"])
    import torch.distributed as dist

    dist.barrier()  # rank 0 is the others' store: it may not go before them
    return value


def _message(error: BaseException) -> str:
    return " ".join(str(error).split())[:250]


def _place(error: BaseException) -> str:
    """Say where in this package it was raised, or above what was called."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "peer_scale" in frame.filename and "doctor" not in Path(frame.filename).parts]
    if not ours:
        return ""
    path = Path(ours[-1].filename)
    return f" ({path.parent.name}/{path.name}:{ours[-1].lineno})"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
