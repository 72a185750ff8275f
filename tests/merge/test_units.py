"""Merge units: groups of tensors that share a coefficient, and the depth of layers."""

import pytest

from dsee_jax.errors import InputError
from merge import units

NAMES = ["model.embed", "model.layers.0.q", "model.layers.10.q", "model.layers.2.q", "norm"]


def test_layer_number_is_found_in_the_names_of_many_families():
    """Names of Hugging Face families and of this library."""
    names = ["h.3.attn.weight", "encoder/layer_3/query/kernel", "bert.encoder.layer.3.x", "blocks.3.mlp", "x/block_3/y"]
    for name in [*names, "transformer.resblocks.3.mlp.c_fc.weight"]:
        assert units.of([name], "layer") == {name: "3"}
    assert units.of(["layernorm.3.x", "model.layers.0.q"], "layer") == {"layernorm.3.x": None, "model.layers.0.q": "0"}


def test_groups_by_tensor_and_by_regular_expression():
    """The regular expression's group ``unit`` names a tensor's group."""
    assert units.of(NAMES, "tensor") == {name: name for name in NAMES}
    groups = units.of(NAMES, r"model\.(?P<unit>\w+)")
    assert groups == dict.fromkeys(NAMES[1:4], "layers") | {"model.embed": "embed", "norm": None}


def test_depth_is_relative_to_the_last_layer():
    assert units.depths(NAMES) == dict(zip(NAMES, [None, 0.0, 1.0, 0.2, None], strict=True))
    assert units.depths(["layer.0.x"]) == {"layer.0.x": 0.0}


TOWERS = {
    "encoder-decoder": ("encoder.block.{}.layer.0.wi.weight", "decoder.block.{}.layer.0.wi.weight"),
    "text and image": ("text_model.encoder.layers.{}.mlp.fc1.bias", "vision_model.encoder.layers.{}.mlp.fc1.bias"),
    "residual blocks": ("transformer.resblocks.{}.ln_1.weight", "visual.transformer.resblocks.{}.ln_1.weight"),
    "stages": ("stages.0.blocks.{}.conv.weight", "stages.1.blocks.{}.conv.weight"),
    "paths": ("encoder/layer_{}/query/kernel", "decoder/layer_{}/query/kernel"),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_of_two_towers_are_not_pooled(kind):
    """Each tower has its own layer 1, at its own depth."""
    first, second = TOWERS[kind]
    names = [first.format(layer) for layer in range(2)] + [second.format(layer) for layer in range(3)]
    groups = units.of(names, "layer")
    assert len(set(groups.values())) == 5
    assert groups[second.format(2)] == second.split("{")[0] + "2"
    assert [*units.depths(names).values()] == [0, 1, 0, 0.5, 1]


def test_natural_order_puts_layer_2_before_layer_10():
    assert sorted(["10", "2", "a10", "a2"], key=units.natural) == ["2", "10", "a2", "a10"]


def test_regular_expression_has_a_time_limit(monkeypatch):
    """A repetition in a repetition takes exponential time."""
    monkeypatch.setattr(units, "SECONDS", 0.2)
    with pytest.raises(InputError, match=r"takes more than 0.2 s on 1 names"):
        units.of(["a" * 60 + "b"], "(?P<unit>(a|a)+)$")


@pytest.mark.parametrize(
    ("unit", "message"), [("layer_(", "neither"), ("layer_.*", "names no group"), ("(?P<unit>zz)", "matches no tensor")]
)
def test_bad_unit_is_refused(unit, message):
    with pytest.raises(InputError, match=message):
        units.of(NAMES, unit)
