"""What ends a command with one line, and what keeps it one line."""

__all__ = ("OutputError", "UsageError", "printable")


class OutputError(Exception):
    """A result could not be written: main prints `softcvm COMMAND: text` and exits with status 1."""


class UsageError(Exception):
    """Bad input: main prints `softcvm COMMAND: text` and exits with status 2."""


def printable(text: str) -> str:
    """One line, whatever bytes a file name or an argument may have brought into it."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )
