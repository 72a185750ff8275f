"""Which tensors share a coefficient, and how deep they lie."""

import pytest

from dsee_jax.errors import InputError
from merge import units

NAMES = ["model.embed", "model.layers.0.q", "model.layers.10.q", "model.layers.2.q", "norm"]


def test_layers_of_many_conventions():
    """Numbered layers are found in the names of several families and of this library."""
    names = ["h.3.attn.weight", "encoder/layer_3/query/kernel", "bert.encoder.layer.3.x", "blocks.3.mlp", "x/block_3/y"]
    assert set(units.of(names, "layer").values()) == {"3"}
    assert units.of(["layernorm.3.x", "model.layers.0.q"], "layer") == {"layernorm.3.x": None, "model.layers.0.q": "0"}


def test_units_by_tensor_and_by_expression():
    """`tensor` is one unit each; an expression names the unit by its group."""
    assert units.of(NAMES, "tensor") == {name: name for name in NAMES}
    found = units.of(NAMES, r"model\.(?P<unit>\w+)")
    assert found == dict.fromkeys(NAMES[1:4], "layers") | {"model.embed": "embed", "norm": None}


def test_depths_and_order():
    """Depth is relative to the last layer; layer 2 sorts before layer 10."""
    assert units.depths(NAMES) == dict(zip(NAMES, [None, 0.0, 1.0, 0.2, None], strict=True))
    assert units.depths(["layer.0.x"]) == {"layer.0.x": 0.0}
    assert sorted(["10", "2", "a10", "a2"], key=units.natural) == ["2", "10", "a2", "a10"]


@pytest.mark.parametrize(
    ("unit", "message"), [("layer_(", "neither"), ("layer_.*", "names no group"), ("(?P<unit>zz)", "matches no tensor")]
)
def test_bad_units(unit, message):
    with pytest.raises(InputError, match=message):
        units.of(NAMES, unit)
