"""How a run can fail in ways that are told in one line, and the exit codes that go with them."""

USER_ERROR_EXIT_CODE = 2
TRAINING_ERROR_EXIT_CODE = 1


class UserError(ValueError):
    """Bad input: the message is one line that names the file, key or value and says what would be right."""


class TrainingError(RuntimeError):
    """A run that cannot sensibly go on; the message names the culprit."""
