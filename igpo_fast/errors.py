"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Bad input: what was wrong, where, and the remedy, in one line. The CLI prints it and exits with code 2."""
