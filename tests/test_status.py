"""The line that says how far long work is."""

import io

import pytest

from mmmamba_edge import status
from mmmamba_edge.status import StatusLine, clock


@pytest.fixture(autouse=True)
def _a_second_passes_at_each_look(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10_000))
    monkeypatch.setattr(status.time, "monotonic", lambda: float(next(now)))


class Terminal(io.StringIO):
    """A stream that is one."""

    def isatty(self) -> bool:
        return True


def test_a_log_gets_first_and_last_and_some_between(capsys):
    say = StatusLine(every=10.0)
    for done in range(31):
        say("layers", done, 30)
    assert capsys.readouterr().err.splitlines() == [
        "layers 0/30",
        "layers 10/30  0:00:20 left",
        "layers 20/30  0:00:10 left",
        "layers 30/30",
    ]


def test_estimate_counts_only_what_was_done_since(capsys):
    """A resumed run's earlier steps took no time of this one."""
    say = StatusLine(every=0)
    for done in (90, 91, 92, 93):
        say("step", done, 100, "loss 1.5")
    assert capsys.readouterr().err.splitlines()[-1] == "step 93/100  loss 1.5  0:00:07 left"


def test_a_terminal_gets_one_line_for_each_piece_of_work(monkeypatch):
    monkeypatch.setattr("sys.stderr", written := Terminal())
    say = StatusLine()
    say("opening")
    say("reading", 1, 2)
    say.note("skipped row 3")
    say("reading", 2, 2)
    say.close()
    assert written.getvalue() == (
        "\r\x1b[Kopening\n\r\x1b[Kreading 1/2\r\x1b[Kskipped row 3\n\r\x1b[Kreading 2/2\n"
    )


def test_clock():
    assert [clock(s) for s in (0.4, 61, 3725)] == ["0:00:00", "0:01:01", "1:02:05"]
