"""What a user of the bench commands can do wrong."""

from __future__ import annotations


class BenchError(ValueError):
    """Something that the user must change; its text says what, in one line."""
