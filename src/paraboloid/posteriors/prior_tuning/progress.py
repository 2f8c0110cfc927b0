"""A line on the terminal for what takes more than a few seconds."""

from __future__ import annotations

import sys
import time

PATIENCE = 3.0  # seconds without a word


class Line:
    """One line on stderr that is written over, from `PATIENCE` seconds on, and only where that is a terminal."""

    def __init__(self, what: str):
        self.what, self.start, self.length = what, time.monotonic(), 0

    def show(self, text: str) -> None:
        """Say where the work stands."""
        if time.monotonic() - self.start > PATIENCE and sys.stderr.isatty():
            line = f"{self.what}: {text}"
            sys.stderr.write("\r" + line.ljust(self.length))
            sys.stderr.flush()
            self.length = len(line)

    def clear(self) -> None:
        """Take the line away."""
        if self.length:
            sys.stderr.write("\r" + " " * self.length + "\r")
            sys.stderr.flush()
