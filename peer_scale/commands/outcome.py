"""How a command ends: exit codes, and one line on stderr where something was wrong."""

import sys
from collections.abc import Callable

from peer_scale.errors import USER_ERROR_EXIT_CODE, UserError

INTERRUPTED_EXIT_CODE = 130


def exit_code(run: Callable[[], None], *, interrupted: str = "interrupted") -> int:
    """Run a command; give 0, 2 after bad input, or 130 after Ctrl-C, the latter two with a line on stderr."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    return 0
