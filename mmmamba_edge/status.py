"""One line on stderr about long work: what is done, how far, how long yet.

At a terminal the line is rewritten in place; in a log it is a line now and then.
"""

import sys
import time
from typing import Protocol

ETA_AFTER_S = 2.0  # an estimate made earlier would jump


class Report(Protocol):
    """Something that is told how far work is; a `StatusLine`, or `silent`."""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """As `StatusLine.__call__`."""
        ...


def silent(what: str, done: int = 0, total: int = 0) -> None:
    """Tells no one."""


class StatusLine:
    """Says how far work is. Calling it is all that is needed.

    Args:
        every: seconds between two lines of the same work in a log; 0: all are written.
    """

    def __init__(self, every: float = 10.0) -> None:
        self._every, self._what, self._open = every, "", False
        self._start = self._began = self._said = 0.0

    def __call__(self, what: str, done: int = 0, total: int = 0, more: str = "") -> None:
        """Work `what` goes on.

        Args:
            what: a few words; other words than last time begin new work.
            done: units done.
            total: units there are; 0: not known.
            more: figures of this moment.
        """
        now = time.monotonic()
        new = what != self._what
        if new:
            self._end()
            self._what, self._began, self._start = what, now, done
        parts = [f"{what} {done:,}/{total:,}" if total else what]
        parts += [more] if more else []
        if done > self._start and done < total and now - self._began > ETA_AFTER_S:
            left = (now - self._began) / (done - self._start) * (total - done)
            parts.append(f"{clock(left)} left")
        line = "  ".join(parts)
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif new or now - self._said >= self._every or done == total > 0:
            print(line, file=sys.stderr, flush=True)
            self._said = now

    def note(self, text: str) -> None:
        """A line that stays, above the status."""
        clear = "\r\x1b[K" if self._open else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)
        self._open = False

    def close(self, *, keep: bool = True) -> None:
        """End the line, or wipe it out."""
        if self._open and not keep:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = False
        self._end()
        self._what = ""

    def _end(self) -> None:
        if self._open:
            print(file=sys.stderr)
        self._open = False


def clock(seconds: float) -> str:
    """Hours, minutes, seconds: 3725 is 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
