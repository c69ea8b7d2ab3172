"""Progress of a long preparation on stderr: a bar on a terminal, a line now and then in a file."""

import io
import sys

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class PreparationBar(tqdm):
    """Bytes of input done, with the documents found in them.

    Args:
        shown: False reports nothing.
        total_bytes: size of the whole input, None where it is not known.
    """

    monitor_interval = 0  # no thread beside this one: each later fork of this process would print a warning

    def __init__(self, shown: bool, total_bytes: int | None) -> None:
        self.documents = 0
        terminal = sys.stderr.isatty()
        super().__init__(
            desc="tokenising",
            total=total_bytes,
            unit="B",
            unit_scale=True,
            disable=not shown,
            file=sys.stderr if terminal else _Lines(),
            mininterval=0.1 if terminal else _SECONDS_BETWEEN_LINES,
            miniters=1,
            dynamic_ncols=terminal,
        )

    def add(self, documents: int, num_bytes: int) -> None:
        """Count a finished piece of work."""
        self.documents += documents
        self.set_postfix_str(f"{self.documents:,} documents", refresh=False)
        self.update(num_bytes)


class _Lines(io.TextIOBase):
    """A stream that gives each state of a bar, which draws itself anew after a carriage return, a line of its own."""

    def write(self, text: str) -> int:
        line = text.strip()
        if line:
            print(line, file=sys.stderr, flush=True)
        return len(text)
