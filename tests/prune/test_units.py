"""Heads and neurons: scores by hand, and masks from kept units and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import tiny
from dsee_jax import models, tree, typing
from dsee_jax.config import PruneConfig
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.errors import InputError
from dsee_jax.prune import units

KEY = jax.random.key(0)


def layer(number):
    """Two heads of two entries, three neurons, in a model 2 wide."""
    name = f"l{number}"
    heads = {f"{name}/{part}": (1, 2) for part in ("q", "v")} | {f"{name}/o": (0, 2)}
    return (
        typing.Units(heads, (f"{name}/q", f"{name}/v")),
        typing.Units({f"{name}/up": (1, 1), f"{name}/bias": (0, 1), f"{name}/down": (0, 1)}, (f"{name}/up",)),
    )


CUTS = {"heads": [layer(0)[0], layer(1)[0]], "neurons": [layer(0)[1], layer(1)[1]]}


def model():
    params = {}
    for number, sign in enumerate((1.0, -1.0)):
        params[f"l{number}"] = {
            "q": sign * jnp.array([[1.0, 2, 3, 4], [0, 0, 0, 1]]),
            "v": jnp.array([[5.0, 0, 0, 0], [0, 0, 1, 0]]) + number,
            "o": jnp.ones((4, 2)),
            "up": jnp.array([[1.0, -3, 2], [1, 0, -2]]) * (number + 1),
            "bias": jnp.ones(3),
            "down": jnp.ones((3, 2)),
        }
    deltas = {"l0": {"q": {"a": jnp.ones((2, 1)), "b": jnp.array([[0.0, 0, -1, 2]]), "values": jnp.array([10.0])}}}
    return params, Adapter(deltas, {"l0": {"q": jnp.array([[1, 0]])}}, 2.0, True)


def kept(masks):
    """Return the kept units as lists of 0 and 1."""
    flat = tree.flatten(units.kept(model()[0], CUTS, masks))
    return {path: np.asarray(flag).astype(int).tolist() for path, flag in flat.items()}


@pytest.mark.parametrize(
    ("score", "scale_sparse", "heads"),
    [
        ("W", True, [[8, 9], [3 + 8 + 1, 8 + 5]]),
        # D = 2 * [[0, 0, -1, 2], [10, 0, -1, 2]] at the query of layer 0; layer 1 has no update and scores its weights.
        ("ABS", True, [[20, 12], [12, 13]]),
        ("ABS", False, [[10, 12], [12, 13]]),
        ("AB", True, [[0, 12], [12, 13]]),
        ("WABS", True, [[3 + 20 + 5, 1 + 8 + 2 + 5 + 1], [12, 13]]),
    ],
)
def test_scores_of_heads_by_hand(score, scale_sparse, heads):
    params, adapter = model()
    by_layer = units.scores(params, adapter.replace(scale_sparse=scale_sparse), CUTS["heads"], score)
    np.testing.assert_allclose(by_layer, heads)


@pytest.mark.parametrize("score", ["W", "ABS", "WABS"])
def test_neurons_without_an_update_score_their_weights(score):
    np.testing.assert_allclose(units.scores(*model(), CUTS["neurons"], score), [[2, 3, 4], [4, 6, 8]])


def test_a_score_of_the_update_refuses_an_update_of_values_alone():
    """The units that no value lies in would all score 0, and their order would decide."""
    params, adapter = model()
    sparse = adapter.replace(deltas={"l0": {"q": {"values": jnp.array([10.0])}}})
    for score in ("AB", "ABS"):
        with pytest.raises(InputError, match="of 'l0/q' has sparse values alone: use W or WABS"):
            units.structured(params, sparse, CUTS, heads=1, score=score)
    units.structured(params, sparse, CUTS, heads=1, score="WABS")


def test_random_scores_depend_on_the_key():
    params, *_ = model()
    draw = lambda key: np.concatenate(units.scores(params, None, CUTS["neurons"], "random", key=key)).tolist()
    assert draw(KEY) == draw(KEY) != draw(jax.random.key(1))
    assert len(set(draw(KEY))) == 6


def test_tensor_and_global_scope_literals():
    args = (*model(), CUTS)
    assert kept(units.structured(*args, heads=0.5, neurons=1, score="W", scope="tensor")) == {
        "heads/layer_0": [0, 1],
        "heads/layer_1": [0, 1],
        "neurons/layer_0": [0, 1, 1],
        "neurons/layer_1": [0, 1, 1],
    }
    masks = units.structured(*args, heads=2, neurons=0.5, score="W")
    assert kept(masks) == {
        "heads/layer_0": [0, 0],
        "heads/layer_1": [1, 1],
        # 2, 3 and one of the equal 4s go; the 4 at the lower index stays.
        "neurons/layer_0": [0, 0, 1],
        "neurons/layer_1": [0, 1, 1],
    }


@pytest.mark.parametrize("heads", [2, 0.5])
def test_layers_with_and_without_an_update_lose_their_shares(heads):
    """By their updates and by their weights, which do not compare: by one pool layer 0 loses both of its tiny updates."""
    params, adapter = model()
    small = adapter.replace(scale=0.02)
    masks = units.structured(params, small, CUTS, heads=heads, score="ABS")
    assert kept(masks) == {"heads/layer_0": [1, 0], "heads/layer_1": [0, 1]}
    # One unit of four: the pools have half a unit each, and one of them gives it.
    one = units.structured(params, small, CUTS, heads=1, score="ABS")
    assert sum(map(sum, kept(one).values())) == 3
    # |W + D| compares with |W|.
    both = units.structured(params, small, CUTS, heads=heads, score="WABS")
    assert kept(both) == {"heads/layer_0": [0, 0], "heads/layer_1": [1, 1]}


def test_masks_under_jit_equal_those_of_the_eager_call():
    """Of scores by name and from a tree; the numbers of units are constants of the program."""
    trees = (*model(), {"heads": {"layer_0": jnp.ones(2), "layer_1": jnp.arange(2.0)}})

    def draw(params, adapter, given, heads=2):
        draw = lambda score, **options: units.structured(params, adapter, CUTS, score=score, **options)
        return (
            draw("WABS", heads=heads, neurons=0.5),
            draw("ABS", heads=heads),
            draw("random", heads=1, neurons=1, scope="tensor", key=KEY),
            draw(given, heads=1),
        )

    jax.tree.map(np.testing.assert_array_equal, jax.jit(draw)(*trees), draw(*trees))
    with pytest.raises(InputError, match="heads is a JAX array; expected a Python number"):
        jax.jit(draw)(*trees, 1)


def test_masks_cover_every_param_of_a_unit():
    options = {"heads": 1, "neurons": 1, "score": "W", "scope": "tensor"}
    masks = tree.flatten(units.structured(*model(), CUTS, **options))
    assert {path.partition("/")[2] for path in masks} == {"q", "v", "o", "up", "bias", "down"}
    assert masks["l0/q"].astype(int).tolist() == [[0, 0, 1, 1]] * 2
    assert masks["l0/o"].astype(int).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert masks["l0/bias"].astype(int).tolist() == [0, 1, 1]
    assert masks["l0/down"].astype(int).tolist() == [[0, 0], [1, 1], [1, 1]]


def test_scores_from_a_tree_decide():
    params, *_ = model()
    tree_of_scores = {"heads": {"layer_0": np.array([0.5, 0.5]), "layer_1": np.array([0.1, 0.9])}}
    assert kept(units.structured(params, None, CUTS, heads=1, score=tree_of_scores, scope="tensor")) == {
        "heads/layer_0": [1, 0],
        "heads/layer_1": [0, 1],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 1.0}, r"heads is 1\.0; expected a fraction in \[0, 1\) or a whole number: 1\.0 leaves none"),
        ({"neurons": -0.1}, r"neurons is -0\.1"),
        ({"heads": 3, "scope": "tensor"}, "heads is 3 and there are 2 to compare"),
        ({"neurons": 7}, "neurons is 7 and there are 6"),
        ({"heads": 1, "score": "WABSS"}, "did you mean 'WABS'"),
        ({"heads": 1, "score": "NABS"}, "score is 'NABS'"),
        ({"heads": 1, "score": "random"}, "needs a key"),
        ({"heads": 1, "scope": "layer"}, "scope is 'layer'"),
        ({"heads": 1, "score": {"heads": {"layer_0": np.ones(2), "layer_1": np.ones(3)}}}, "given scores of heads"),
        ({"heads": 1, "score": {"neurons": {"layer_0": np.ones(3)}}}, "given scores of heads"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(InputError, match=message):
        units.structured(*model(), CUTS, **options)


def test_mask_of_a_part_of_a_unit_is_named():
    params, adapter = model()
    masks = tree.flatten(units.structured(params, adapter, CUTS, heads=1, score="W"))

    def spoiled(**changes):
        return tree.unflatten({path: mask for path, mask in (masks | changes).items() if mask is not None})

    for masks_, message in (
        (spoiled(**{"l0/q": masks["l0/q"].at[0, 3].set(False)}), "'l0/q' prunes a part of unit 1"),
        (spoiled(**{"l0/v": ~masks["l0/v"]}), "'l0/q' prunes heads and 'l0/v' has a different mask"),
        (spoiled(**{"l0/o": None}), "'l0/q' prunes heads and 'l0/o' has no mask"),
        (spoiled(**{"l0/norm": jnp.ones(2, bool)}), "'l0/norm' is not of heads or neurons"),
    ):
        with pytest.raises(InputError, match=message):
            units.kept(params, CUTS, masks_)


def test_axis_that_units_do_not_divide_is_named():
    params, *_ = model()
    params["l0"]["q"] = params["l0"]["q"][:, :3]
    with pytest.raises(InputError, match="'l0/q' has 3 entries on axis 1; units of 2 do not divide it"):
        units.structured(params, None, CUTS, heads=1, score="W")
    params["l0"]["q"] = params["l0"]["q"][:, :2]
    with pytest.raises(
        InputError,
        match="'l0/. has 1 units and|'l0/.' has 2 units and 'l0/q' 1: params of one layer hold the same units",
    ):
        units.structured(params, None, CUTS, heads=1, score="W")


def checked(fields, **pruning):
    """Check the units of a pruning, uniform unless told otherwise, of a model whose kernels are all prunable."""
    architecture = models.find(fields["model_type"])
    model = architecture.model(architecture.config.from_hf(fields), "features")
    params = models.shapes(model)
    prune = PruneConfig(**{"kind": "structured", "uniform": True, **pruning})
    units.check_units(model, params, [*tree.flatten(params)], prune)


def test_uniform_pruning_of_layers_that_differ_is_refused():
    with pytest.raises(
        InputError, match=r"prune.uniform is true and the layers have \[3, 2\] heads: start from a model"
    ):
        checked(tiny.config(kept_heads=[3, 2]), neurons=0.5)


@pytest.mark.parametrize(
    ("fields", "pruning", "message"),
    [
        (tiny.config(), {"layers": 2}, "prune.layers is 2: all 2 layers of the model would go; keep one or more"),
        (tiny.config(), {"hidden": 24}, "prune.hidden is 24: all 24 hidden dimensions of the model would go"),
        (tiny.config(), {"layers": 1, "heads": 4}, "prune.heads is 4 and there are 3 to compare"),
        (
            tiny.config(num_hidden_layers=3, num_attention_heads=1),
            {"layers": 1, "neurons": 100, "uniform": False},
            "prune.neurons is 100 and there are 80 to compare",
        ),
        (
            tiny.config(),
            {"hidden": 9, "heads": 1},
            "prune.hidden leaves a width of 15, which the fields of bert in config.json cannot hold with 2 heads of 8 entries "
            "(they can hold 16): prune heads in proportion",
        ),
        (
            decoders.config(),
            {"hidden": 7},
            "a width of 17, .* cannot hold with 2 heads of 4 entries (they can hold 24, 18, ",
        ),
        (
            decoders.config(model_type="gpt2", scale_attn_by_inverse_layer_idx=True),
            {"layers": 1},
            "'scale_attn_by_inverse_layer_idx' is true",
        ),
    ],
)
def test_layers_and_width_that_cannot_go_are_refused_before_a_run(fields, pruning, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        checked(fields, **pruning)


def test_heads_that_fill_the_width_become_a_standard_field(caplog):
    checked(tiny.config(), heads=1, hidden=8)
    checked(decoders.config(model_type="mistral"), hidden=7)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["layers", "hidden"])
def test_kernels_that_may_go_must_be_targets(kind):
    config = models.find("bert").config.from_hf(tiny.config())
    model = models.find("bert").model(config, "features")
    prune = PruneConfig(kind="structured", **{kind: 1})
    with pytest.raises(InputError, match=rf"prune.{kind} is 1 and prune.targets leaves out 'encoder/layer_0/attention"):
        units.check_units(model, models.shapes(model), [], prune)


@pytest.mark.parametrize(
    ("fields", "pruning", "message"),
    [
        (tiny.config(), {"heads": 1}, "bert in config.json cannot hold 2 of its 3 heads (they can hold 3)"),
        (
            decoders.config(num_attention_heads=12, num_key_value_heads=6),
            {"heads": 1},
            "llama in config.json cannot hold 5 of its 6 heads (they can hold 6, 4, 3, 2, 1)",
        ),
        (decoders.config(model_type="mistral", num_attention_heads=12, num_key_value_heads=6), {"heads": 1}, ""),
        (tiny.config(), {"neurons": 0.3}, ""),
    ],
)
def test_uniform_pruning_warns_where_the_fields_lack_room(caplog, fields, pruning, message):
    """Other programs then open the model with zeros only."""
    checked(fields, **pruning)
    assert message in caplog.text
    assert bool(message) == bool(caplog.records)
