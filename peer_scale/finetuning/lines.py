"""Lines of strangers' text files, with their numbers: what is wrong with one is said in one line that names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from peer_scale.errors import UserError


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file, counted from 1, without their ends; a byte order mark is passed over.

    Lines end at a newline alone: what else Unicode takes for the end of a line is text.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise bad_line(path, number, "not UTF-8") from None
                yield number, text.rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def tab_separated(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the fields of each line that is not empty; quotes are text."""
    for number, line in numbered_lines(path):
        if line:
            yield number, line.split("\t")


def bad_line(path: Path, number: int, problem: str) -> UserError:
    """Say what is wrong with a line."""
    return UserError(f"{path}: line {number}: {problem}")


def number_in(text: str, path: Path, line: int) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise bad_line(path, line, f"the label {text!r} is not a number")
    return value
