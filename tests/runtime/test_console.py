"""Lines for a person."""

import pytest
from rich.table import Table

from dsee_jax.runtime import console


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (999.7, "1 kB"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (90_900_000, "90.9 MB"),
        (999_600_000, "1 GB"),
        (16.9e9, "16.9 GB"),
        (2.5e15, "2.5 PB"),
    ],
)
def test_size_has_three_significant_digits(count, text):
    assert console.size(count) == text


def test_names_from_outside_are_shown_as_they_are(capsys):
    """Markup in them means nothing, and control characters cannot change the terminal or begin a line."""
    table = Table(title="[/x] \x1b[2J")
    table.add_column("[bold]a")
    table.add_row("[/b] :smile: \n\x1b]0;t\x07 \u202e\ud800 é")
    console.show(table)
    console.show("two\nlines \x1b[1m\r")
    shown = capsys.readouterr().out
    assert all(part in shown for part in (r"[/x] \x1b[2J", "[bold]a", r"[/b] :smile: \n\x1b]0;t\x07 \u202e\ud800 é"))
    assert shown.endswith("two\nlines \\x1b[1m\\r\n")
    assert not {"\x1b", "\x07", "\r"} & set(shown)
