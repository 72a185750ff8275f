"""Updates: new updates change nothing, attached equals folded, and any Linen model takes updates unedited."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsee_jax import tree
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas import attach, create, fold
from dsee_jax.errors import InputError

KEY = jax.random.key(0)


class Stranger(nn.Module):
    """A model outside this library: a Dense with an input of three axes, a Dense without a bias, a repeated layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(12, name="wide")(x))
        shared = nn.Dense(12, use_bias=False, name="shared")
        return nn.LayerNorm()(shared(shared(x)) + x)


class Scanned(nn.Module):
    """Layers under scan and remat: kernels, updates and supports are stacked."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0, "delta": 0, "support": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, name="dense")(x)), None


def grown(updates, key=KEY):
    """Return updates with random values; initial updates are zero and would test nothing."""
    leaves, structure = jax.tree.flatten(updates)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten([0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def made(model, x, **options):
    params = model.init(KEY, x)["params"]
    config = DeltaConfig(**{"targets": (".*/kernel",), "rank": 2, "nonzeros": 5, "support": "random"} | options)
    return params, *create.init(params, config, key=KEY)


@pytest.mark.parametrize("model", [Stranger(), Scanned()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("scale_sparse", [True, False])
def test_attached_updates_equal_folded_updates(model, scale_sparse):
    x = jax.random.normal(KEY, (2, 3, 8))
    params, updates, supports = made(model, x)
    options = {"scale": 1.5, "scale_sparse": scale_sparse}
    np.testing.assert_array_equal(attach.apply(model, params, updates, supports, x), model.apply({"params": params}, x))
    updates = grown(updates)
    attached = attach.apply(model, params, updates, supports, x, **options)
    folded = model.apply({"params": fold.materialize(params, updates, supports, **options)}, x)
    assert float(jnp.max(jnp.abs(attached - model.apply({"params": params}, x)))) > 0.1
    np.testing.assert_allclose(attached, folded, atol=1e-5)


def test_gradients_of_attached_and_folded_updates_agree():
    x = jax.random.normal(KEY, (2, 3, 8))
    model = Scanned()
    params, updates, supports = made(model, x)
    updates = grown(updates)
    loss = lambda y: jnp.sum(jnp.sin(y))
    attached = jax.grad(lambda d: loss(attach.apply(model, params, d, supports, x)))(updates)
    folded = jax.grad(lambda d: loss(model.apply({"params": fold.materialize(params, d, supports)}, x)))(updates)
    jax.tree.map(lambda a, f: np.testing.assert_allclose(a, f, rtol=2e-4, atol=1e-5), attached, folded)


def test_materialize_equals_the_equation():
    w = jnp.arange(6.0).reshape(2, 3)
    delta = {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[1.0, 0.0, -1.0]]), "values": jnp.array([10.0, 20.0])}
    support = jnp.array([[0, 1], [1, 2]])
    tree_of = lambda leaf: {"dense": {"kernel": leaf}}
    folded = fold.materialize(tree_of(w), tree_of(delta), tree_of(support), scale=2.0)["dense"]["kernel"]
    np.testing.assert_array_equal(folded, [[2.0, 21.0, 0.0], [7.0, 4.0, 41.0]])
    unscaled = fold.materialize(tree_of(w), tree_of(delta), tree_of(support), scale=2.0, scale_sparse=False)
    np.testing.assert_array_equal(unscaled["dense"]["kernel"], [[2.0, 11.0, 0.0], [7.0, 4.0, 21.0]])


@pytest.mark.parametrize(
    ("rank", "nonzeros", "names"), [(2, 5, {"a", "b", "values"}), (2, 0, {"a", "b"}), (0, 5, {"values"})]
)
def test_zero_rank_or_nonzeros_creates_no_array(rank, nonzeros, names):
    _, updates, supports = made(Stranger(), jnp.zeros((1, 8)), rank=rank, nonzeros=nonzeros)
    for delta in fold.kernels(updates).values():
        assert set(delta) == names
    assert set(tree.flatten(supports)) == (set(fold.kernels(updates)) if nonzeros else set())
    assert fold.count(updates) == rank * (8 + 12 + 12 + 12) + 2 * nonzeros


def test_zero_rank_and_nonzeros_create_no_update():
    _, updates, supports = made(Stranger(), jnp.zeros((1, 8)), rank=0, nonzeros=0, targets=("nothing",))
    assert (updates, supports) == ({}, {})


@pytest.mark.parametrize(("rank", "nonzeros", "count"), [(16, 0, 589_824), (16, 128, 592_896), (16, 64, 591_360)])
def test_trained_parameters_of_bert_base_equal_the_paper(rank, nonzeros, count):
    """Query and value of BERT-base, 24 kernels of 768 x 768; the numbers are from the tables of the paper."""
    shape = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    params = {f"layer_{i}": {n: {"kernel": shape} for n in ("query", "value")} for i in range(12)}
    config = DeltaConfig(targets=(".*",), rank=rank, nonzeros=nonzeros, support="random")
    updates, _ = jax.eval_shape(lambda p: create.init(p, config, key=KEY), params)
    assert fold.count(updates) == count


def test_updates_depend_on_the_key():
    params = Stranger().init(KEY, jnp.zeros((1, 8)))["params"]
    config = DeltaConfig(targets=(".*/kernel",), rank=2, nonzeros=5, support="random")
    first, again, other = (create.init(params, config, key=jax.random.key(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first[0]["wide"]["kernel"]["a"], other[0]["wide"]["kernel"]["a"])
    assert not np.array_equal(first[1]["wide"]["kernel"], other[1]["wide"]["kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ("wide/kernl",)}, "did you mean 'wide/kernel'"),
        ({"targets": (".*/scale",)}, r"'LayerNorm_0/scale', which is float32\(12,\)"),
        ({"nonzeros": 1000}, r"delta.nonzeros is 1000; 'shared/kernel' has 12 x 12 = 144 entries"),
        ({"rank": 9}, r"delta.rank is 9; 'wide/kernel' is 8 x 12"),
    ],
)
def test_bad_config_is_named(options, message):
    with pytest.raises(InputError, match=message):
        made(Stranger(), jnp.zeros((1, 8)), **options)


def test_update_that_reaches_no_module_is_named():
    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", nn.initializers.normal(), (8, 8))

    params, updates, supports = made(Raw(), jnp.zeros((1, 8)), targets=("kernel",))
    with pytest.raises(InputError, match="the update of 'kernel' reached no nn.Dense"):
        attach.apply(Raw(), params, updates, supports, jnp.zeros((1, 8)))


def test_bfloat16_compute_keeps_small_updates():
    """An update below the last place of the kernel vanishes when folded in 16 bits, and must not when attached."""
    model = nn.Dense(64, dtype=jnp.bfloat16)
    x = jnp.ones((2, 64))
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
    updates = {"kernel": {"a": jnp.full((64, 1), 0.01), "b": jnp.full((1, 64), 0.05)}}
    moved = attach.apply(model, params, updates, {}, x, scale=1.0) - model.apply({"params": params}, x)
    exact = 64 * 0.01 * 0.05
    assert float(jnp.max(jnp.abs(moved.astype(jnp.float32) - exact))) <= 0.25  # one place of bfloat16 at 64
    full = attach.apply(model, jax.tree.map(jnp.zeros_like, params), updates, {}, x, scale=1.0)
    np.testing.assert_allclose(full.astype(jnp.float32), exact, rtol=1e-2)
