"""Progress in a log that is no terminal: a line every few seconds, and no bar."""

import sys
from types import SimpleNamespace

import pytest

from hanorec.run import progress as module
from hanorec.run.progress import Lines, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock.now, in seconds."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_line_every_ten_seconds(clock, capsys):
    done = []
    for value in progress(range(60), desc="evaluate", unit="batch"):
        done.append(value)
        clock.now += 3
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert done == list(range(60)) and printed.out == ""
    # 180 seconds: a line at the first batch that ends ten seconds or more after the last line
    assert len(lines) == 15 and "\r" not in printed.err
    assert lines[0] == "evaluate: 4 of 60, 3 min left"
    assert lines[-1] == "evaluate: 60 of 60, 0 s left"


def test_a_short_loop_prints_nothing(clock, capsys):
    with progress(total=3, desc="items", unit="item") as bar:
        for _ in range(3):
            clock.now += 3
            bar.update()
    assert capsys.readouterr().err == ""


def test_steps_of_an_earlier_process_do_not_count_for_the_speed(clock, capsys):
    bar = progress(total=120, desc="sft", unit="step")
    bar.n = bar.initial = 100
    bar.set_postfix({"loss": "2.500"})
    clock.now = 10
    bar.update(10)
    assert capsys.readouterr().err == "sft: 110 of 120, 10 s left, loss 2.500\n"


def test_other_processes_print_nothing(clock, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    bar = progress(total=5, desc="sft", unit="step")
    clock.now = 60
    bar.update()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress(total=5, desc="sft", unit="step")
    assert not isinstance(bar, Lines) and bar.total == 5
    bar.close()
