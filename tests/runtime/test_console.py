"""Lines for a person."""

import pytest

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
