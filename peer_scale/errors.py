"""How a run can fail in ways that are told in one line, and the exit codes that go with them."""

USER_ERROR_EXIT_CODE = 2
TRAINING_ERROR_EXIT_CODE = 1


STOPPED_EXIT_CODE = 75
"""Of a run that was stopped and saved, as sysexits.h has it: a passing reason, so start it again."""

_LONGEST_MESSAGE = 2000


def one_line(text: str) -> str:
    """Make text that may come from strangers' files fit for a terminal: control characters escaped, not too long."""
    if not text.isprintable():
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."


class UserError(ValueError):
    """Bad input: the message is one line that names the file, key or value and says what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class FoundAlone(UserError):
    """What one rank finds before it can talk to the others, so that each node has to say it."""


class DamagedError(UserError):
    """A checkpoint is not whole, or not what was written."""


class TrainingError(RuntimeError):
    """A run that cannot sensibly go on; the message names the culprit."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class StoppedEarly(BaseException):
    """A run ends before its last step because it was told to; the same command goes on where it stopped.

    Not an Exception, like KeyboardInterrupt: a signal may raise it anywhere.
    """
