"""Progress bars appear on a terminal only; elsewhere stderr has plain lines."""

import io

import pytest

from dsee_jax.runtime import console, terminal
from merge import run

PLACES = {
    "a file": (False, {"TERM": "xterm"}),
    "a file where colours are forced": (False, {"TERM": "xterm", "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}),
    "a terminal without a cursor": (True, {"TERM": "dumb"}),
}


class Stream(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


def drawn(monkeypatch, is_terminal, environment):
    """Return the text of both bars on a stderr."""
    stream = Stream(is_terminal)
    monkeypatch.setattr("sys.stderr", stream)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with console.bar("tune", 0, 2) as advance:
        advance(1, "loss 0.1")
    with run._progress(quiet=False) as progress:
        progress.begin("merge", 8)
        progress.advance(4)
    return stream.getvalue()


@pytest.mark.parametrize("place", PLACES)
def test_no_bar_is_drawn_on(monkeypatch, place):
    assert drawn(monkeypatch, *PLACES[place]) == ""


def test_bars_are_drawn_on_a_terminal_and_without_colours_if_asked(monkeypatch):
    assert "tune" in drawn(monkeypatch, True, {"TERM": "xterm"})
    text = drawn(monkeypatch, True, {"TERM": "xterm", "NO_COLOR": "1"})
    assert "merge" in text
    assert "\x1b[3" not in text


@pytest.mark.parametrize("has_widgets", [False, True])
def test_a_notebook_shows_bars_by_ipywidgets_alone(monkeypatch, has_widgets):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr(console.importlib.util, "find_spec", lambda name: has_widgets or None)
    assert console.draws_bars() == has_widgets


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_of_other_packages_follow(monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr", Stream(is_terminal))
    monkeypatch.setenv("TERM", "xterm")
    for name in terminal._OFF:
        monkeypatch.setenv(name, "")
    terminal.silence_bars()
    assert {terminal.os.environ[name] for name in terminal._OFF} == {"" if is_terminal else "1"}
