"""The kept units of a folder: write and read, and the first difference of two models."""

import numpy as np
import pytest

from dsee_jax.ckpt import kept_units


def kept(**layers):
    """Return kept units from layers such as ``heads_3="101"``."""
    units = {}
    for name, flags in layers.items():
        kind, number = name.split("_")
        units.setdefault(kind, {})[f"layer_{number}"] = np.array([flag == "1" for flag in flags])
    return units


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ({}, {}, None),
        (kept(heads_0="101"), kept(heads_0="101"), None),
        (kept(heads_0="111", heads_1="101"), kept(heads_1="101"), None),
        (kept(heads_0="101"), {}, "the heads of layer 0"),
        (kept(heads_0="101"), kept(heads_0="011"), "the heads of layer 0"),
        (kept(heads_0="101"), kept(heads_0="1011"), "the heads of layer 0"),
        (kept(neurons_2="01", heads_10="1"), kept(neurons_2="10", heads_10="0"), "the neurons of layer 2"),
        (kept(neurons_2="01", heads_2="1"), kept(neurons_2="10", heads_2="0"), "the heads of layer 2"),
    ],
)
def test_first_difference_is_named(a, b, where):
    assert kept_units.difference(a, b) == kept_units.difference(b, a) == where


def test_kept_units_are_read_back(tmp_path):
    kept_units.write(tmp_path, {})
    assert not [*tmp_path.iterdir()]
    assert kept_units.read(tmp_path) == {}
    kept_units.write(tmp_path, kept(heads_0="101", neurons_0="0"))
    assert kept_units.difference(kept_units.read(tmp_path), kept(heads_0="101", neurons_0="0")) is None
