"""A file for each rank with what it warns of and what it ends by."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path

from peer_scale.errors import StoppedEarly, TrainingError, UserError
from peer_scale.quiet import HIDDEN

_LOGGER = logging.getLogger("peer_scale")


class _RankFile(logging.FileHandler):
    """Takes what is logged anywhere, and still shows on stderr what no other handler does."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path, encoding="utf-8")
        host = socket.gethostname().replace("%", "%%")
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter(f"%(asctime)s {host} rank {rank} %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if not self._is_handled_elsewhere(record.name) and logging.lastResort is not None:
            logging.lastResort.handle(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that fails ends no run."""

    def close(self) -> None:
        """Close the file; a disk that fails costs the last lines."""
        with contextlib.suppress(OSError):
            super().close()

    def _is_handled_elsewhere(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


@contextlib.contextmanager
def rank_log(folder: Path | None, rank: int) -> Iterator[None]:
    """Write warnings and errors of this process, and the exception that ends the block, to `folder`/rank_N.log.

    What the libraries' loggers are not allowed to say on the terminal stands there too, and the stacks of a process
    that crashes. Where the file cannot be had, or `folder` is None, the block runs without.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = _RankFile(folder / f"rank_{rank:05d}.log", rank)
    except OSError:
        yield
        return
    loggers = [logging.getLogger(), logging.getLogger(HIDDEN)]
    for logger in loggers:
        logger.addHandler(handler)
    stream, shows_crashes = handler.stream, False
    if stream is not None and not faulthandler.is_enabled():  # else somebody wants crashes elsewhere
        faulthandler.enable(stream.fileno())
        shows_crashes = True
    try:
        yield
    except (KeyboardInterrupt, StoppedEarly):
        raise
    except BaseException as error:
        is_told = isinstance(error, UserError | TrainingError)
        _LOGGER.error("%s", error if is_told else "".join(traceback.format_exception(error)).rstrip())
        raise
    finally:
        if shows_crashes:
            faulthandler.disable()
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
