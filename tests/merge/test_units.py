"""Merge units: groups of tensors that share a coefficient, and the depth of layers."""

import pytest

from dsee_jax.errors import InputError
from merge import units

NAMES = ["model.embed", "model.layers.0.q", "model.layers.10.q", "model.layers.2.q", "norm"]


def test_layer_number_is_found_in_the_names_of_many_families():
    """Names of Hugging Face families and of this library."""
    names = ["h.3.attn.weight", "encoder/layer_3/query/kernel", "bert.encoder.layer.3.x", "blocks.3.mlp", "x/block_3/y"]
    assert set(units.of(names, "layer").values()) == {"3"}
    assert units.of(["layernorm.3.x", "model.layers.0.q"], "layer") == {"layernorm.3.x": None, "model.layers.0.q": "0"}


def test_groups_by_tensor_and_by_regular_expression():
    """The regular expression's group ``unit`` names a tensor's group."""
    assert units.of(NAMES, "tensor") == {name: name for name in NAMES}
    groups = units.of(NAMES, r"model\.(?P<unit>\w+)")
    assert groups == dict.fromkeys(NAMES[1:4], "layers") | {"model.embed": "embed", "norm": None}


def test_depth_is_relative_to_the_last_layer():
    assert units.depths(NAMES) == dict(zip(NAMES, [None, 0.0, 1.0, 0.2, None], strict=True))
    assert units.depths(["layer.0.x"]) == {"layer.0.x": 0.0}


def test_natural_order_puts_layer_2_before_layer_10():
    assert sorted(["10", "2", "a10", "a2"], key=units.natural) == ["2", "10", "a2", "a10"]


@pytest.mark.parametrize(
    ("unit", "message"), [("layer_(", "neither"), ("layer_.*", "names no group"), ("(?P<unit>zz)", "matches no tensor")]
)
def test_bad_unit_is_refused(unit, message):
    with pytest.raises(InputError, match=message):
        units.of(NAMES, unit)
