"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing with -q."""

import io
import sys

import pytest

from tqdit import console
from tqdit.console import Console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock[0] is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_one_line_per_ten_percent_with_the_time_left(clock, capsys):
    with Console().bar(250, "sampling", "steps") as bar:
        for _ in range(250):
            clock[0] += 0.25
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "sampling: 10 %, 25 of 250 steps, 56 s left"
    assert lines[2] == "sampling: 30 %, 75 of 250 steps, 44 s left"
    assert lines[-1] == "sampling: 100 %, 250 of 250 steps, done in 62 s"


@pytest.mark.parametrize(("seconds", "left"), [(1, "9 s"), (20, "3.0 min"), (3600, "9.0 h")])
def test_long_times_are_in_minutes_and_hours(clock, capsys, seconds, left):
    bar = Console().bar(10, "sampling", "steps")
    clock[0] += seconds
    bar.update()
    assert capsys.readouterr().err == f"sampling: 10 %, 1 of 10 steps, {left} left\n"


def test_a_large_update_is_one_line(capsys):
    with Console().bar(1000, "sampling", "images") as bar:
        bar.update(640)
        bar.update(10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sampling: 60 %, 640 of 1000 images, ")


def test_the_time_left_follows_the_speed_since_the_last_line(clock, capsys):
    """A continued run counts at once what an earlier one has done; that says nothing about its speed."""
    with Console().bar(100, "rows", "steps") as bar:
        bar.update(50)
        clock[0] += 20
        bar.update(10)
    assert capsys.readouterr().err.splitlines()[1] == "rows: 60 %, 60 of 100 steps, 80 s left"


def test_the_phases_of_a_build_each_have_their_lines(capsys):
    with Console().bar(1, "compiling", "steps") as bar:
        bar.leave = False
        for phase in ("parsing", "timing"):
            bar.set_description_str(phase, refresh=False)
            bar.reset(total=2)
            for done in (0, 1, 2):
                bar.n = done
                bar.refresh()
            assert bar.desc == phase
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "parsing: 50 %", "parsing: 100 %", "timing: 50 %", "timing: 100 %",
    ]  # fmt: skip


def test_nothing_to_do_is_no_line(capsys):
    with Console().bar(0, "sampling", "images") as bar:
        bar.update(0)
        bar.set_postfix_str("2 workers")
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console().bar(2, "sampling", "steps") as bar:
        bar.update(2)
    assert "sampling: 100% |" in terminal.getvalue()


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_quiet_is_silent(monkeypatch, stream):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Console(quiet=True).bar(2, "sampling", "steps") as bar:
        bar.update(2)
        bar.set_postfix_str("2 workers")
        Console(quiet=True).say("text")
    assert stderr.getvalue() == ""
