"""Which units a folder is made of: there and back, and where two cuts first differ."""

import numpy as np
import pytest

from dsee_jax.ckpt import kept_units


def cut(**layers):
    """Layers by ``heads_3="101"``."""
    found = {}
    for name, flags in layers.items():
        kind, number = name.split("_")
        found.setdefault(kind, {})[f"layer_{number}"] = np.array([flag == "1" for flag in flags])
    return found


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [
        ({}, {}, None),
        (cut(heads_0="101"), cut(heads_0="101"), None),
        (cut(heads_0="111", heads_1="101"), cut(heads_1="101"), None),
        (cut(heads_0="101"), {}, "the heads of layer 0"),
        (cut(heads_0="101"), cut(heads_0="011"), "the heads of layer 0"),
        (cut(heads_0="101"), cut(heads_0="1011"), "the heads of layer 0"),
        (cut(neurons_2="01", heads_10="1"), cut(neurons_2="10", heads_10="0"), "the neurons of layer 2"),
        (cut(neurons_2="01", heads_2="1"), cut(neurons_2="10", heads_2="0"), "the heads of layer 2"),
    ],
)
def test_where_two_cuts_first_differ(a, b, where):
    assert kept_units.difference(a, b) == kept_units.difference(b, a) == where


def test_there_and_back(tmp_path):
    kept_units.write(tmp_path, {})
    assert not [*tmp_path.iterdir()]
    assert kept_units.read(tmp_path) == {}
    kept_units.write(tmp_path, cut(heads_0="101", neurons_0="0"))
    assert kept_units.difference(kept_units.read(tmp_path), cut(heads_0="101", neurons_0="0")) is None
