"""Progress of a long preparation on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What is told of every finished piece of work."""

    def advance(self, documents: int, num_bytes: int) -> None:
        """Adds documents and bytes of input."""


@contextmanager
def open_progress(shown: bool, total_bytes: int | None) -> Iterator[Progress]:
    """Opens a progress report.

    Args:
        shown: False reports nothing.
        total_bytes: size of the whole input, None where it is not known.
    """
    if not shown:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bar(total_bytes) as bar:
            yield bar
    else:
        lines = _Lines(total_bytes)
        yield lines
        lines.write()


class _Silent:
    def advance(self, documents: int, num_bytes: int) -> None:
        pass


@dataclass
class _Lines:
    total_bytes: int | None
    documents: int = 0
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    written: float = field(default_factory=time.monotonic)

    def advance(self, documents: int, num_bytes: int) -> None:
        self.documents += documents
        self.num_bytes += num_bytes
        if time.monotonic() - self.written >= _SECONDS_BETWEEN_LINES:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        rate = self.num_bytes / max(self.written - self.started, 1e-9)
        text = f"tokenising: {self.documents:,} documents, {self.num_bytes / 1e6:.1f} MB"
        if self.total_bytes:
            left = max(self.total_bytes - self.num_bytes, 0) / max(rate, 1e-9)
            text += f" of {self.total_bytes / 1e6:.1f} MB, ETA {time.strftime('%H:%M:%S', time.gmtime(left))}"
        print(f"{text}, {rate / 1e6:.2f} MB/s", file=sys.stderr, flush=True)


@contextmanager
def _bar(total_bytes: int | None) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichBar

    columns = (
        TextColumn("tokenising"),
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichBar(*columns, console=Console(stderr=True)) as progress:
        yield _Bar(progress, progress.add_task("", total=total_bytes, documents=0))


class _Bar:
    def __init__(self, progress: "RichProgress", task: "TaskID") -> None:
        self._progress, self._task, self._documents = progress, task, 0

    def advance(self, documents: int, num_bytes: int) -> None:
        self._documents += documents
        self._progress.update(self._task, advance=num_bytes, documents=self._documents)
