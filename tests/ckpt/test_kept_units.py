"""The kept units of a folder: write and read, and the first difference of two models."""

import numpy as np
import pytest

from dsee_jax.ckpt import kept_units, packed_masks
from dsee_jax.errors import InputError


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


def test_units_of_the_whole_model_differ_first():
    layers, hidden = {"layers": np.array([True, False])}, {"hidden": np.array([True, False, True])}
    assert kept_units.difference(layers | kept(heads_0="10"), {}) == "the layers of the model"
    assert kept_units.difference(hidden, layers) == "the hidden dimensions of the model"
    assert kept_units.difference(hidden, {"hidden": np.ones(3, bool)}) == "the hidden dimensions of the model"
    assert kept_units.difference({"layers": np.ones(2, bool)}, {}) is None


def test_units_of_a_later_version_are_refused(tmp_path):
    packed_masks.save(tmp_path / "kept.safetensors", {"experts": {"layer_0": np.array([True, False])}})
    with pytest.raises(InputError, match=r"'experts/layer_0' \(2,\) are no units of a model; update dsee_jax"):
        kept_units.read(tmp_path)


def test_kept_units_are_read_back(tmp_path):
    kept_units.write(tmp_path, {})
    assert not [*tmp_path.iterdir()]
    assert kept_units.read(tmp_path) == {}
    kept_units.write(tmp_path, kept(heads_0="101", neurons_0="0"))
    assert kept_units.difference(kept_units.read(tmp_path), kept(heads_0="101", neurons_0="0")) is None
    whole = {"layers": np.array([True, False]), "hidden": np.array([False, True, True])}
    kept_units.write(tmp_path, whole)
    assert {kind: flags.tolist() for kind, flags in kept_units.read(tmp_path).items()} == {
        kind: flags.tolist() for kind, flags in whole.items()
    }
