"""Runs a command that gets SIGTERM when a given process dies: `python -m peer_scale.experiments.bound PID COMMAND...`.

Setting this up between fork and exec would be unsafe in a process with threads.
"""

import os
import signal
import sys

from peer_scale.lifetime import end_with_parent


def main() -> None:
    """Become the command."""
    end_with_parent(int(sys.argv[1]), signal.SIGTERM)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
