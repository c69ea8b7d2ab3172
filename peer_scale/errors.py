"""The one kind of error a user can cause, and how a program ends on it."""

USER_ERROR_EXIT_CODE = 2


class UserError(ValueError):
    """Bad input: the message is one line that names the file, key or value and says what would be right."""
