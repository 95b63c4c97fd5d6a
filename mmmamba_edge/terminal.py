"""What a person at a terminal sees: answers on stdout, all else, dim, on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mmmamba_edge.runtimes.base import Progress

PATIENCE_S = 0.5  # reading that takes longer shows how far it is

# Control characters but newline and tab: an answer must not steer the terminal.
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def write(text: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(text.translate(_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A line that is no answer."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def say_if_watched(text: str) -> None:
    """A line for a person; left out where stderr goes to a file or a pipe."""
    if sys.stderr.isatty():
        say(text)


def lines() -> Iterator[str]:
    """Lines as they are typed, with line editing and history, until Ctrl-D."""
    with suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401  importing it is what gives input() a history
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            say("\nCtrl-D or /quit ends")
        except EOFError:
            print(file=sys.stderr)
            return


@contextmanager
def reading() -> Iterator[Progress | None]:
    """A progress function for prefill that keeps one line up to date, and removes it at the end."""
    if not sys.stderr.isatty():
        yield None
        return
    start, shown = time.monotonic(), False

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done < total and time.monotonic() - start > PATIENCE_S:
            shown = True
            print(f"\r\x1b[2mreading {done} of {total} tokens\x1b[0m", end="", file=sys.stderr)
            sys.stderr.flush()

    try:
        yield progress
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def size(count: int) -> str:
    """Bytes for people: 33554432 is 32 MiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"
