"""EarlyBERT: coefficients act on their units, the draw is exact, and a search prunes dead units."""

import dataclasses
import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from dsee_jax import compact, masks, models, tree, typing
from dsee_jax.ckpt import hf
from dsee_jax.config import DeltaConfig, TrainConfig
from dsee_jax.deltas import attach, fold
from dsee_jax.errors import InputError
from dsee_jax.prune import earlybert, units
from dsee_jax.train import optim, step

KEY = jax.random.key(0)
QUICKLY = {"xla_backend_optimization_level": 0}
"""Compile fast: the arrays are too small for optimised code to pay."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return ``(model, params, cuts, coefficients)``; coefficients are positive and not 1, so relu(c x) = c relu(x)."""
    folder = tiny.bert(tmp_path_factory.mktemp("tickets") / "base", hidden_act="relu")
    model, params = hf.load_pretrained(folder)
    cuts = models.cuts(model)
    return model, params, cuts, shaken(earlybert.init(cuts, params))


def ones(heads, neurons):
    """Return coefficients of 1 for the numbers of heads and neurons of each layer."""
    return {
        kind: {f"layer_{number}": jax.device_put(np.ones(width, np.float32)) for number, width in enumerate(widths)}
        for kind, widths in (("heads", heads), ("neurons", neurons))
    }


def shaken(coefficients, *, low=0.5, high=1.5):
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda c: jax.device_put(noise.uniform(low, high, c.shape).astype(np.float32)), coefficients)


def attached(model, params, cuts, coefficients, batch, adapter=None):
    with earlybert.attached(coefficients, cuts):
        return attach.apply(model, params, adapter, batch)


@functools.cache
def compiled(model):
    """Return a compiled ``(params, batch)`` without coefficients."""
    return jax.jit(lambda params, batch: attach.apply(model, params, None, batch))


def compiled_attached(model, params, cuts, coefficients, batch, adapter=None):
    run = jax.jit(lambda params, c, batch, adapter: attached(model, params, cuts, c, batch, adapter))
    return run(params, coefficients, batch, adapter)


def test_coefficients_of_one_change_nothing(made):
    model, params, cuts, _ = made
    start = earlybert.init(cuts, params)
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, ones((3, 3), (40, 40)))
    jax.tree.map(np.testing.assert_array_equal, earlybert.scaled(params, start, cuts), params)
    batch = tiny.batch()
    expected = attach.apply(model, params, None, batch)
    np.testing.assert_array_equal(attached(model, params, cuts, start, batch), expected)


def multiplied(params, coefficients):
    """Return params whose units give ``c`` times their outputs, by a change of the kernels that write the units."""
    flat = {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}
    for kind, name, entries in (("heads", "attention/value", 8), ("neurons", "mlp/up", 1)):
        for layer, c in coefficients[kind].items():
            for leaf in ("kernel", "bias"):
                flat[f"encoder/{layer}/{name}/{leaf}"] *= np.broadcast_to(
                    np.repeat(c, entries), flat[f"encoder/{layer}/{name}/{leaf}"].shape
                )
    return tree.unflatten(flat)


def test_attached_and_scaled_compute_one_function(made):
    """`multiplied` needs no code of this library: a context is linear in the values, and relu is positively homogeneous."""
    model, params, cuts, coefficients = made
    batch = tiny.batch()
    plain, expected, rows = (
        np.asarray(compiled(model)(p, batch))
        for p in (params, multiplied(params, coefficients), earlybert.scaled(params, coefficients, cuts))
    )
    assert np.max(np.abs(expected - plain)) > 0.1
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    np.testing.assert_allclose(compiled_attached(model, params, cuts, coefficients, batch), expected, atol=1e-5)


def test_coefficients_scale_attached_updates(made):
    model, params, cuts, coefficients = made
    config = DeltaConfig(targets=(".*/(output|down)/kernel",), rank=2, alpha=4.0, nonzeros=5, support="random")
    adapter = tiny.adapter(params, config, spread=0.3)
    batch = tiny.batch()
    fold_and_scale = jax.jit(lambda p, a, c: earlybert.scaled(fold.materialize(p, a), c, cuts))
    expected = compiled(model)(fold_and_scale(params, adapter, coefficients), batch)
    logits = compiled_attached(model, params, cuts, coefficients, batch, adapter)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_gradients_of_attached_and_scaled_agree(made):
    model, params, cuts, coefficients = made
    batch = tiny.batch()
    loss = lambda logits: jnp.sum(jnp.sin(logits))
    on_activations = lambda p, c: loss(attached(model, p, cuts, c, batch))
    on_rows = lambda p, c: loss(attach.apply(model, earlybert.scaled(p, c, cuts), None, batch))
    gradients, expected = (
        jax.jit(jax.grad(form, argnums=(0, 1)), compiler_options=QUICKLY)(params, coefficients)
        for form in (on_activations, on_rows)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), gradients, expected)
    assert all(np.all(np.asarray(c) != 0) for c in gradients[1]["heads"].values())


def test_coefficient_gradients_are_float32_in_a_bfloat16_model(made):
    model, params, cuts, coefficients = made
    low = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    batch = tiny.batch()
    slope = lambda model: jax.jit(
        jax.grad(lambda c: jnp.sum(attached(model, params, cuts, c, batch))), compiler_options=QUICKLY
    )
    gradients, expected = slope(low)(coefficients), slope(model)(coefficients)
    for x, y in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=0.05 * np.max(np.abs(y)))


class Stranger(nn.Module):
    """A model outside this library."""

    @nn.compact
    def __call__(self, x):
        for number in range(2):
            x = x + nn.Dense(4, use_bias=False, name=f"out_{number}")(nn.tanh(nn.Dense(6, name=f"in_{number}")(x)))
        return x


def test_compiled_function_takes_the_coefficients_of_each_block():
    cuts = {"neurons": [typing.Units({"layers_0/kernel": (0, 1)}, ())]}
    run = jax.jit(lambda params, x: nn.Sequential([nn.Dense(1, use_bias=False)]).apply({"params": params}, x))
    params, results = {"layers_0": {"kernel": np.ones((2, 1), np.float32)}}, []
    for coefficients in ([1, 1], [0, 3]):
        with earlybert.attached({"neurons": {"layer_0": np.asarray(coefficients, np.float32)}}, cuts):
            results.append(run(params, np.ones((1, 2), np.float32)).item())
    assert results == [2, 3]


def test_any_linen_model_takes_coefficients():
    cuts = {
        "neurons": [
            typing.Units({f"in_{i}/kernel": (1, 1), f"in_{i}/bias": (0, 1), f"out_{i}/kernel": (0, 1)}, ())
            for i in (0, 1)
        ]
    }
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(jnp.bfloat16)
    params = tiny.params(Stranger(), x)
    coefficients = shaken(earlybert.init(cuts, params))
    run = lambda params, x: Stranger().apply({"params": params}, x)
    expected = jax.jit(lambda p, x: run(earlybert.scaled(p, coefficients, cuts), x))(params, x)
    with earlybert.attached(coefficients, cuts):
        outputs = jax.jit(run)(params, x)
    assert outputs.dtype == expected.dtype
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


def test_penalty_by_hand():
    assert float(earlybert.penalty({"heads": {"a": np.array([1.0, -2.0])}, "neurons": {"b": np.array([0.5])}})) == 3.5
    assert float(earlybert.penalty({})) == 0


def test_equal_coefficients_lose_the_exact_number_of_units():
    """BERT-base: 4 of 12 heads per layer, 14,746 of 36,864 neurons; the authors' strict quantile would prune all."""
    kept = earlybert.draw(ones((12,) * 12, (3072,) * 12), heads=1 / 3, neurons=0.4)
    for mask in kept["heads"].values():
        np.testing.assert_array_equal(mask, np.arange(12) < 8)
    neurons = np.concatenate([kept["neurons"][f"layer_{number}"] for number in range(12)])
    np.testing.assert_array_equal(neurons, np.arange(36864) < 36864 - 14746)


def test_draw_by_hand():
    """Heads compare within their layer, neurons over the model: layer 1 loses all of its neurons and layer 0 none."""
    coefficients = {
        "heads": {"layer_0": np.array([0.1, 0.1, -0.3, 0.2]), "layer_1": np.array([9.0, 7.0, 8.0, 7.0])},
        "neurons": {"layer_0": np.array([0.9, -0.8, 0.7]), "layer_1": np.array([0.1, 0.2])},
    }
    coefficients = jax.device_put(coefficients)
    drawn = lambda **options: jax.tree.map(np.ndarray.tolist, earlybert.draw(coefficients, **options))
    assert drawn(heads=0.5, neurons=0.4) == {
        "heads": {"layer_0": [False, False, True, True], "layer_1": [True, False, True, False]},
        "neurons": {"layer_0": [True, True, True], "layer_1": [False, False]},
    }
    assert drawn(heads=2, neurons=2) == drawn(heads=0.5, neurons=0.4)
    assert drawn(heads=0.5, neurons=0.4, signed=True) == {
        "heads": {"layer_0": [True, False, False, True], "layer_1": [True, False, True, False]},
        "neurons": {"layer_0": [True, False, True], "layer_1": [False, True]},
    }
    assert drawn(neurons=1, uniform=True)["neurons"] == {"layer_0": [True, True, False], "layer_1": [False, True]}


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.4, 0.99])
def test_draw_equals_a_stable_sort(fraction):
    """Coefficients have many ties and layers differ in width; layer_10 comes after layer_2."""
    coefficients = shaken(ones((8,) * 11, range(1, 12)), low=-1, high=1)
    coefficients = jax.tree.map(lambda c: jax.device_put(np.round(8 * np.asarray(c)) / 8), coefficients)
    kept = earlybert.draw(coefficients, heads=fraction, neurons=fraction)

    def highest(scores):
        order = np.argsort(-np.abs(scores), kind="stable")
        mask = np.zeros(scores.shape, bool)
        mask[order[: scores.size - round(fraction * scores.size)]] = True
        return mask

    for layer, c in coefficients["heads"].items():
        np.testing.assert_array_equal(kept["heads"][layer], highest(c))
    flags, scores = (
        np.concatenate([x["neurons"][f"layer_{number}"] for number in range(11)]) for x in (kept, coefficients)
    )
    np.testing.assert_array_equal(flags, highest(scores))


def test_attached_masked_and_compacted_tickets_agree(made):
    """Kept units have the coefficient 1, pruned units 0; layer 1 loses all of its neurons."""
    model, params, cuts, coefficients = made
    coefficients = coefficients | {
        "neurons": coefficients["neurons"] | {"layer_1": jax.device_put(np.full(40, 0.1, np.float32))}
    }
    kept = earlybert.draw(coefficients, heads=1 / 3, neurons=0.6)
    drawn = units.masks(params, cuts, kept)
    by_score = functools.partial(units.structured, params, None, cuts, score=coefficients)
    scored = masks.intersect(by_score(heads=1 / 3, scope="tensor"), by_score(neurons=0.6))
    jax.tree.map(np.testing.assert_array_equal, drawn, scored)
    small, cut = compact(model, params, drawn)
    assert small.config.widths == {"heads": (2, 2), "neurons": (32, 0)}
    batch = tiny.batch()
    expected = np.asarray(compiled(small)(cut, batch))
    assert np.max(np.abs(expected - np.asarray(compiled(model)(params, batch)))) > 0.1
    np.testing.assert_allclose(compiled_attached(model, params, cuts, kept, batch), expected, atol=1e-5)
    again = earlybert.init(models.cuts(small), cut)
    assert jax.tree.map(jnp.shape, again) == {
        "heads": {"layer_0": (2,), "layer_1": (2,)},
        "neurons": {"layer_0": (32,)},
    }
    np.testing.assert_allclose(compiled_attached(small, cut, models.cuts(small), again, batch), expected, atol=1e-5)


def test_distance_by_hand():
    one = {"heads": {"a": np.array([True, False]), "b": np.array([True] * 2)}, "neurons": {"a": np.array([True] * 3)}}
    other = {"heads": {"a": np.array([False, True]), "b": np.array([True] * 2)}, "neurons": {"a": np.array([True] * 3)}}
    assert earlybert.distance(one, other) == earlybert.distance(other, one) == {"heads": 0.5, "neurons": 0.0}
    assert earlybert.distance(one, jax.tree.map(np.logical_not, one)) == {"heads": 1.0, "neurons": 1.0}


def test_summary_and_packed_by_hand():
    coefficients = {"heads": {"layer_0": np.float32([1, 0.5])}, "neurons": {"layer_0": np.float32([4, 0, 1, 2, 3])}}
    assert earlybert.summary(coefficients) == {
        "heads": {"layer_0": [1.0, 0.5]},
        "neurons": {"layer_0": [0.0, 1.0, 2.0, 3.0, 4.0]},
    }
    kept = {"heads": {"layer_0": np.array([True, False])}, "neurons": {"layer_0": np.arange(9) % 8 == 7}}
    assert earlybert.packed(kept) == {"heads": {"layer_0": "80"}, "neurons": {"layer_0": "0100"}}


def test_settled_needs_every_recent_distance_under_the_tolerance():
    far, near, mixed = ({"heads": h, "neurons": n} for h, n in ((0.5, 0.5), (0.01, 0.02), (0.01, 0.5)))
    settled = lambda *distances, **options: earlybert.settled(distances, **{"tolerance": 0.1, "patience": 2} | options)
    assert settled(far, near, near)
    assert not settled(near, far, near)
    assert not settled(near, near, mixed)
    assert not settled(near)
    assert not settled()
    assert settled(near, patience=1)
    assert not settled({"heads": 0.0, "neurons": 0.0}, patience=1, tolerance=0.0)


def errors():
    equal, odd, deep = ones((3, 3), (40, 40)), ones((5,), ()), ones((), (40,) * 3)
    return {
        "all heads": (lambda model, params, cuts: earlybert.draw(equal, heads=1.0), "heads is 1.0"),
        "fewer than no neurons": (lambda model, params, cuts: earlybert.draw(equal, neurons=-0.1), "neurons is -0.1"),
        "more heads than there are": (lambda model, params, cuts: earlybert.draw(equal, heads=4), "heads is 4 .* 3 to"),
        "rows of other units": (lambda model, params, cuts: earlybert.scaled(params, odd, cuts), "24 inputs.* for 40"),
        "inputs of other units": (
            lambda model, params, cuts: attached(model, params, cuts, odd, tiny.batch()),
            "24 inputs",
        ),
        "no such layer": (lambda model, params, cuts: earlybert.scaled(params, deep, cuts), "neurons of layer_2"),
        "no table": (lambda model, params, cuts: attached(model, params, {}, equal, tiny.batch()), "heads of layer_0"),
        "another model": (lambda model, params, cuts: stranger_within(equal, cuts), "reached no"),
    }


def stranger_within(coefficients, cuts):
    with earlybert.attached(coefficients, cuts):
        Stranger().init(KEY, np.ones((1, 4), np.float32))


@pytest.mark.parametrize("name", errors())
def test_errors_name_what_is_wrong(made, name):
    call, message = errors()[name]
    with pytest.raises(InputError, match=message):
        call(*made[:3])


DEAD = {
    "heads": {"layer_0": [1], "layer_1": [0]},
    "neurons": {"layer_0": [*range(0, 40, 2)], "layer_1": [*range(7, 19)]},
}
"""A third of the heads of each layer and 32 of 80 neurons."""


def deadened(params):
    """Return params whose units in DEAD output 0 and have zero rows in their readers, so that no gradient revives them."""
    flat = {path: np.array(leaf) for path, leaf in tree.flatten(params).items()}
    for kind, written, read, entries in (
        ("heads", "attention/value", "attention/output", 8),
        ("neurons", "mlp/up", "mlp/down", 1),
    ):
        for layer, dead in DEAD[kind].items():
            index = [entries * unit + entry for unit in dead for entry in range(entries)]
            flat[f"encoder/{layer}/{written}/kernel"][:, index] = 0
            flat[f"encoder/{layer}/{written}/bias"][index] = 0
            flat[f"encoder/{layer}/{read}/kernel"][index] = 0
    return tree.unflatten(flat)


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """Return a search of 30 steps: the first token of a sentence decides the label, and every weight is trained."""
    model, params = hf.load_pretrained(tiny.bert(tmp_path_factory.mktemp("search") / "base"))
    params, cuts, optimizer = deadened(params), models.cuts(model), optim.adamw(TrainConfig())
    one = step.train_step(model, optimizer, DeltaConfig(), cuts=cuts, penalty=1e-4)
    one = jax.jit(one, donate_argnums=0, compiler_options=QUICKLY)

    def run():
        trained = {
            "deltas": {},
            "params": jax.tree.map(jnp.array, params),
            "coefficients": earlybert.init(cuts, params),
        }
        state, losses = step.State(jnp.zeros((), jnp.int32), trained, jax.jit(optimizer.init)(trained)), []
        for number in range(30):
            batch = tiny.batch(rows=16, length=8, padded=False, seed=number % 4)
            batch |= {"labels": batch["input_ids"][:, 0] % 2, "weights": np.ones(16, np.float32)}
            state, loss = one(state, step.Frozen({}, {}, {}), batch, KEY, 1e-2)
            losses.append(float(loss))
        return state.trained["coefficients"], losses

    return run


def test_search_prunes_dead_units(search):
    coefficients, losses = search()
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    kept = earlybert.draw(coefficients, heads=1 / 3, neurons=0.4)
    assert jax.tree.map(lambda mask: np.flatnonzero(~mask).tolist(), kept) == DEAD


def test_search_is_reproducible(search):
    jax.tree.map(np.testing.assert_array_equal, search()[0], search()[0])


HEADS = {
    f"{name}/{part}": (axis, 1) for name in ("query", "key", "value") for part, axis in (("kernel", 1), ("bias", 0))
}
ATTENTION = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=16)
ATTENTION_CUTS = {"heads": (typing.Units(HEADS | {"out/kernel": (0, 1)}, ("query/kernel",)),)}
"""Flax's attention: the kernels hold the heads on an axis of their own."""


def attention():
    x = jax.device_put(np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32))
    return jax.device_put(tiny.params(ATTENTION, x)), x


@pytest.mark.parametrize("wrap", [lambda params: params, flax.core.freeze])
def test_coefficients_of_flax_attention_scale_other_rows(wrap):
    params, x = attention()
    c = np.array([0.5, -1.0, 2.0, 0.0], np.float32)
    coefficients = {"heads": {"layer_0": jax.device_put(c)}}
    expected = np.asarray(params["out"]["kernel"]) * c[:, None, None]
    scaled = earlybert.scaled(wrap(params), coefficients, ATTENTION_CUTS)
    assert type(scaled) is type(wrap(params))
    np.testing.assert_array_equal(scaled["out"]["kernel"], expected)
    run = jax.jit(lambda params, x: ATTENTION.apply({"params": params}, x))
    with earlybert.attached(coefficients, ATTENTION_CUTS):
        y = run(params, x)
    np.testing.assert_allclose(y, run(scaled, x), atol=1e-6)


@pytest.mark.parametrize("score", ["W", "WABS"])
def test_heads_of_flax_attention_have_other_scores(score):
    params, _ = attention()
    config = DeltaConfig(
        targets=(("query/kernel", {"orientation": "in_out_out"}),), rank=2, nonzeros=3, support="random"
    )
    adapter = tiny.adapter(params, config, spread=0.3)
    w = (params if score == "W" else jax.jit(fold.materialize)(params, adapter))["query"]["kernel"]
    (scores,) = units.scores(params, adapter, ATTENTION_CUTS["heads"], score)
    np.testing.assert_allclose(scores, np.abs(np.asarray(w, np.float64)).sum((0, 2)), rtol=1e-5)
    kept = units.structured(params, adapter, ATTENTION_CUTS, heads=1, score=score)
    assert np.asarray(kept["out"]["kernel"]).all((1, 2)).tolist() == (np.arange(4) != np.argmin(scores)).tolist()


def test_coefficients_entered_after_updates_are_lost_without_a_word():
    params, x = attention()
    config = DeltaConfig(targets=(("out/kernel", {"orientation": "in_in_out"}),), rank=2, nonzeros=0)
    adapter, ones = tiny.adapter(params, config), earlybert.init(ATTENTION_CUTS, params)
    with earlybert.attached(ones, ATTENTION_CUTS), attach.attached(adapter):
        jax.jit(ATTENTION.apply)({"params": params}, x)
    refused = pytest.raises(InputError, match="enter it before dsee_jax.attached")
    with attach.attached(None), refused, earlybert.attached(ones, ATTENTION_CUTS):
        pass
