"""What the disk refuses, told in one line that names the file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from peer_scale.errors import UserError


@contextlib.contextmanager
def naming_the_file(written: Path | None = None) -> Iterator[None]:
    """Raise what the disk raises in the block as a UserError that names the file: the error's own, else `written`.

    A full disk's error has no file. Where `written` is None, too, the error stays as it is.
    """
    try:
        yield
    except SafetensorError as error:
        if written is None:
            raise
        raise UserError(f"{written}: {error}") from None
    except OSError as error:
        name = error.filename2 or error.filename or written
        if name is None:
            raise
        raise UserError(f"{name}: {error.strerror}") from None
