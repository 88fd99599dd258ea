from __future__ import annotations

import io

import pytest

from taskmoe.train.track.console import ConsoleView, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_without_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    view = ConsoleView(100, stream=stream, clock=clock)
    clock.now += 20
    view.update(10, {"train/loss": 1.23456, "train/tokens_per_second": 12345.6})
    view.advance(11)
    view.line("saved [checkpoint-10]")
    view.close()
    view.close()
    lines = stream.getvalue().splitlines()
    assert lines == ["step 10/100  loss 1.2346  12,346 tokens/s  3:00 left", "saved [checkpoint-10]"]


def test_time_left_counts_from_where_the_run_resumed() -> None:
    stream, clock = io.StringIO(), Clock()
    view = ConsoleView(100, start=90, stream=stream, clock=clock)
    clock.now += 10
    view.update(95, {})
    assert stream.getvalue() == "step 95/100  0:10 left\n"


def test_a_bar_on_a_terminal_and_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream, clock = Terminal(), Clock()
    view = ConsoleView(100, stream=stream, clock=clock)
    clock.now += 5
    view.update(50, {"train/loss": 0.5, "train/tokens_per_second": 1000.0})
    view.advance(52)  # between two logged steps
    view.line("saved [red]checkpoint-50[/red]")
    view.close()
    view.line("done")
    text = stream.getvalue()
    assert "52/100" in text and "loss 0.5000  1,000 tokens/s  0:05 left" in text
    assert "saved [red]checkpoint-50[/red]" in text  # not markup
    assert text.endswith("done\n") and "\x1b[?25h" in text  # the cursor is back


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    ConsoleView(10, stream=stream).update(0, {"train/loss": 2.0})
    assert stream.getvalue() == "step 0/10  loss 2.0000\n"


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
