"""Wrong arguments of functions that prune, mask and fold: one line that names the argument."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsee_jax import DeltaConfig, InputError, apply, compact, deltas, masks, materialize, models, prune, typing

PARAMS = {"up": {"kernel": jnp.ones((4, 8))}}
CONFIG = DeltaConfig(targets=("up",), rank=2, nonzeros=2, support="magnitude")
ADAPTER = deltas.init(PARAMS, CONFIG, key=jax.random.key(0))
RULES = ["up"]
KEPT = prune.unstructured(PARAMS, None, RULES)
CUTS = {"neurons": (typing.Units({"up/kernel": (1, 1)}, ("up/kernel",)),)}
FLOATS = jax.tree.map(lambda mask: mask.astype(jnp.float32), KEPT)
FLOAT_SUPPORT = ADAPTER.replace(supports=jax.tree.map(lambda support: support.astype(jnp.float32), ADAPTER.supports))
SHORT = ADAPTER.replace(deltas=jax.tree.map(lambda leaf: leaf[:1], ADAPTER.deltas))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: materialize(PARAMS, ADAPTER.deltas), "type dict; expected an Adapter"),
        (lambda: prune.unstructured(PARAMS, ADAPTER.deltas, RULES), "type dict; expected an Adapter"),
        (lambda: prune.structured(PARAMS, ADAPTER.deltas, CUTS, neurons=1), "type dict; expected an Adapter"),
        (lambda: prune.structured(PARAMS, SHORT, CUTS, neurons=1), "'up/kernel' has"),
        (lambda: prune.structured(PARAMS, None, ["up"], neurons=1), "cuts is of the type list"),
        (lambda: prune.structured(PARAMS, None, CUTS, neurons="half"), "neurons is 'half'"),
        (lambda: materialize(PARAMS, FLOAT_SUPPORT), "'support' of dtype float32; expected whole numbers"),
        (lambda: prune.unstructured(PARAMS, None, "up"), "the rules are 'up'"),
        (lambda: prune.unstructured(PARAMS, None, {"up": False}), "the rules are {'up': False}"),
        (lambda: prune.unstructured(PARAMS, None, None), "the rules are None"),
        (lambda: prune.unstructured(PARAMS, None, [("up", True, 1)]), "a rule is"),
        (lambda: prune.unstructured(PARAMS, None, RULES, sparsity="half"), "sparsity is 'half'"),
        (lambda: prune.unstructured(PARAMS, None, RULES, sparsity=None), "sparsity is None"),
        (lambda: prune.unstructured(PARAMS, None, RULES, sparsity=prune.cubic(0.5, steps=2)), "value at a step"),
        (lambda: prune.unstructured(PARAMS, None, RULES, sparsity=jnp.zeros(2)), "expected one number"),
        (lambda: prune.unstructured(PARAMS, None, RULES, keep=FLOATS), "in keep is float32; expected bool"),
        (lambda: prune.nm(PARAMS, None, RULES, n="2"), "n is '2'; expected a whole number that is not traced"),
        (lambda: prune.nm(PARAMS, None, [("up", {"m": 4.0})]), "m is 4.0; expected a whole number"),
        (
            lambda: jax.jit(lambda n: prune.nm(PARAMS, None, RULES, n=n))(2),
            "n is .*; expected a whole number that is not",
        ),
        (
            lambda: prune.unstructured(PARAMS, None, RULES, score="WANDA", inputs=jnp.ones(4)),
            "inputs is of the type ArrayImpl; expected a mapping of the path",
        ),
        (lambda: prune.unstructured(PARAMS, None, RULES, score="random", key=0), "key is 0; expected one PRNG key"),
        (lambda: deltas.init(PARAMS, CONFIG, key=0), "key is 0; expected one PRNG key"),
        (
            lambda: deltas.init(PARAMS, CONFIG, key=jax.random.split(jax.random.key(0))),
            r"key is an array of key<fry>\(2,\); expected one",
        ),
        (lambda: deltas.init(PARAMS, {"targets": ["up"]}, key=jax.random.key(0)), "type dict; expected a DeltaConfig"),
        (
            lambda: apply(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), PARAMS, ADAPTER, jnp.ones((1, 4))),
            "Linen module, found Linear",
        ),
        (lambda: models.cuts(nn.Dense(4)), "the model is of the type Dense; expected a model of this library"),
        (lambda: models.cuts(PARAMS), "the model is of the type dict; expected a model of this library"),
        (lambda: compact(nn.Dense(4), PARAMS, KEPT), "the model is of the type Dense"),
        (
            lambda: jax.jit(lambda c: prune.earlybert.draw(c, neurons=1))({"neurons": {"layer_0": jnp.ones(4)}}),
            "the coefficients are traced; .* outside of jax.jit",
        ),
        (lambda: masks.apply(PARAMS, {"up": {"kernel": True}}), "the mask of 'up/kernel' is True"),
        (lambda: masks.intersect(KEPT, {"up": {"kernel": np.ones((2, 8), bool)}}), r"shapes \(4, 8\) and \(2, 8\)"),
    ],
)
def test_wrong_arguments_are_not_named(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_numpy_integer_is_no_number_of_units():
    kept = prune.structured(PARAMS, None, CUTS, neurons=np.int64(3))
    assert np.asarray(kept["up"]["kernel"]).all(0).sum() == 5


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_raw_key_of_any_kind_is_taken(kind):
    with jax.default_prng_impl(kind):
        assert deltas.init(PARAMS, CONFIG, key=jax.random.PRNGKey(0)).deltas
