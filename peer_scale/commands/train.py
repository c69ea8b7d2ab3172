"""Pre-train a text encoder: `deepspeed peer_scale/pretrain.py --deepspeed_config ds_configs/zero2.json [flags]`.

Runs the same under `deepspeed`, `torchrun`, `srun`, `mpirun`, alone as `peer-scale train`, and as
`python -m peer_scale.pretrain`.
"""

import os
import sys
import time
from collections.abc import Sequence

from peer_scale.commands.outcome import INTERRUPTED_EXIT_CODE
from peer_scale.errors import (
    STOPPED_EXIT_CODE,
    TRAINING_ERROR_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    FoundAlone,
    StoppedEarly,
    TrainingError,
    UserError,
)
from peer_scale.parallel.environment import detect_environment
from peer_scale.quiet import silence_libraries
from peer_scale.settings.flags import build_parser

# A launcher ends all ranks when the first one does: the others wait until rank 0 has spoken.
_SECONDS_FOR_RANK_0_TO_SPEAK = 20.0


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train; give 0, or with one line on stderr another exit code.

    That is 2 after bad input, 1 where training broke down, 75 where the run was stopped and saved and is to be started
    again, 130 after Ctrl-C.
    """
    rank = local_rank = 0
    try:
        rank = detect_environment(os.environ).rank
        args = build_parser(prog).parse_args(argv)
        environment = detect_environment(os.environ, args.local_rank)
        local_rank = environment.local_rank
        if not args.verbose:
            silence_libraries()
        from peer_scale.training.job import run_job

        run_job(args, environment)
    except (UserError, TrainingError) as error:
        if rank == 0 or (local_rank == 0 and isinstance(error, FoundAlone)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_SECONDS_FOR_RANK_0_TO_SPEAK)
        return USER_ERROR_EXIT_CODE if isinstance(error, UserError) else TRAINING_ERROR_EXIT_CODE
    except StoppedEarly as stop:
        if rank == 0:
            print(str(stop), file=sys.stderr, flush=True)
        return STOPPED_EXIT_CODE
    except KeyboardInterrupt as interrupt:
        if rank == 0:
            print(str(interrupt) or "interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED_EXIT_CODE
    return 0
