"""What a user did wrong, said in one line."""

__all__ = ("UsageError",)


class UsageError(Exception):
    """Bad input: main prints `softcvm COMMAND: text` and exits with status 2."""
