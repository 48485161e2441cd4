"""The one exception the command line turns into a message instead of a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message says what and what would work."""


def missing_extra(error: ImportError) -> UsageError:
    """The message for an optional package that is not installed."""
    return UsageError(f"{error.name} is not installed; the trainer needs: pip install -e '.[train]'")
