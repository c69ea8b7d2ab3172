"""JSON that is not one value per line: arrays, pretty-printed values and values side by side, as a stream."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from peer_scale.corpus.formats.base import BYTE_ORDER_MARK
from peer_scale.errors import UserError

MAX_RECORD_CHARS = 1 << 26
"""How much of the text is held at most, so that a lost brace does not bring a whole file into memory."""

Fail = Callable[[int, str], UserError]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(f"[ \t\r\n{BYTE_ORDER_MARK}]*")


def iter_json_values(chunks: Iterator[str], fail: Fail) -> Iterator[tuple[int, Any]]:
    """Yield (line, from 1, where it begins; value) of each element of the arrays, and of each value outside them.

    Args:
        chunks: the text.
        fail: makes the error of a line and of what is wrong there.

    Raises:
        UserError: the text is not JSON, ends inside a value, or holds one of more than `MAX_RECORD_CHARS`.
    """
    text = _Text(chunks)
    while char := text.next_char():
        if char == "[":
            yield from _elements(text, fail)
        else:
            yield _value(text, fail)


def reason(error: ValueError | RecursionError) -> str:
    """Say why text is not JSON, without the place, which the library counts from the beginning of a record."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def _elements(text: "_Text", fail: Fail) -> Iterator[tuple[int, Any]]:
    text.position += 1  # the bracket
    if text.next_char() == "]":
        text.position += 1
        return
    while True:
        yield _value(text, fail)
        char = text.next_char()
        if char not in ("]", ","):
            break
        text.position += 1
        if char == "]":
            return
        if not text.next_char():
            break
    problem = (
        "not JSON (a comma is missing)" if char not in ("", ",") else "the file ends inside an array; is it whole?"
    )
    raise fail(text.line(), problem)


def _value(text: "_Text", fail: Fail) -> tuple[int, Any]:
    line = text.line()
    try:
        return line, text.next_value()
    except (ValueError, RecursionError) as error:
        raise fail(line, f"not JSON ({reason(error)})") from error


class _Text:
    """A window of a long text, with the position of what is to be read next."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self._window = ""
        self.position = 0
        self._lines, self._counted = 0, 0  # ends of lines up to a place of the window

    def next_char(self) -> str:
        """Go to the next character that is not white space; "" at the end."""
        while True:
            match = _SPACE.match(self._window, self.position)
            assert match is not None
            if match.end() < len(self._window):
                self.position = match.end()
                return self._window[self.position]
            if not self._read_on(1):
                self.position = match.end()
                return ""

    def next_value(self) -> Any:
        """Read the value that begins here.

        Raises:
            ValueError: it is not JSON, ends with the text, or is too long.
            RecursionError: it is nested too deeply.
        """
        while True:
            held = len(self._window) - self.position
            try:
                value, self.position = _DECODER.raw_decode(self._window, self.position)
                return value
            except ValueError:
                # Perhaps the value only goes on. The text doubles, so that few attempts are made.
                if held >= MAX_RECORD_CHARS or not self._read_on(min(held, MAX_RECORD_CHARS - held)):
                    raise

    def line(self) -> int:
        """Return the number, from 1, of the line where the position is."""
        passed = self._window[self._counted : self.position]
        self._lines += passed.count("\n") + passed.count("\r") - passed.count("\r\n") - passed.count("\r\r\n")
        self._counted = self.position
        return self._lines + 1

    def _read_on(self, num_chars: int) -> bool:
        """Let go of what was read and append chunks of some length together; say whether there were any."""
        chunks: list[str] = []
        while num_chars > 0 and (chunk := next(self._chunks, None)) is not None:
            chunks.append(chunk)
            num_chars -= len(chunk)
        if not chunks:
            return False
        self.line()
        self._window = self._window[self.position :] + "".join(chunks)
        self.position = self._counted = 0
        return True
