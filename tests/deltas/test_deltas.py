"""Updates: new updates change nothing, attached equals folded, and any Linen model takes updates unedited."""

import dataclasses
import gc
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import tiny
from dsee_jax import tree
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas import attach, create, fold
from dsee_jax.deltas.adapter import Adapter, count, kernels
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
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(8, name="dense")(x)), None


def normal(*shape, size=1.0, seed=0):
    return jax.device_put((size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32))


def grown(adapter, seed=0):
    """Return an adapter with random values; initial updates are zero and would test nothing."""
    leaves, structure = jax.tree.flatten(adapter.deltas)
    values = [normal(*leaf.shape, size=0.3, seed=seed + number) for number, leaf in enumerate(leaves)]
    return adapter.replace(deltas=structure.unflatten(values))


def made(model, x, **options):
    params = jax.device_put(tiny.params(model, x))
    config = DeltaConfig(**{"targets": (".*/kernel",), "rank": 2, "nonzeros": 5, "support": "random"} | options)
    return params, create.init(params, config, key=KEY)


@pytest.mark.parametrize("model", [Stranger(), Scanned()], ids=lambda model: type(model).__name__)
@pytest.mark.parametrize("scale_sparse", [True, False])
def test_attached_updates_equal_folded_updates(model, scale_sparse):
    x = normal(2, 3, 8)
    params, adapter = made(model, x, alpha=3.0, scale_sparse=scale_sparse)
    np.testing.assert_array_equal(attach.apply(model, params, adapter, x), model.apply({"params": params}, x))
    adapter = grown(adapter)
    attached = np.asarray(attach.apply(model, params, adapter, x))
    run = jax.jit(lambda params: model.apply({"params": params}, x))
    folded = run(jax.jit(fold.materialize)(params, adapter))
    assert np.max(np.abs(attached - np.asarray(run(params)))) > 0.1
    np.testing.assert_allclose(attached, folded, atol=1e-5)


def test_gradients_of_attached_and_folded_updates_agree():
    x = normal(2, 3, 8)
    model = Scanned()
    params, adapter = made(model, x)
    adapter = grown(adapter)
    loss = lambda y: jnp.sum(jnp.sin(y))
    loss_of = lambda d: loss(attach.apply(model, params, adapter.replace(deltas=d), x))
    attached = jax.jit(jax.grad(loss_of))(adapter.deltas)
    plain = lambda d: fold.materialize(params, adapter.replace(deltas=d))
    folded = jax.jit(jax.grad(lambda d: loss(model.apply({"params": plain(d)}, x))))(adapter.deltas)
    jax.tree.map(lambda a, f: np.testing.assert_allclose(a, f, rtol=2e-4, atol=1e-5), attached, folded)


def test_materialize_equals_the_equation():
    w = jnp.arange(6.0).reshape(2, 3)
    delta = {"a": jnp.array([[1.0], [2.0]]), "b": jnp.array([[1.0, 0.0, -1.0]]), "values": jnp.array([10.0, 20.0])}
    support = jnp.array([[0, 1], [1, 2]])
    tree_of = lambda leaf: {"dense": {"kernel": leaf}}
    adapter = Adapter(tree_of(delta), tree_of(support), 2.0, True)
    folded = fold.materialize(tree_of(w), adapter)["dense"]["kernel"]
    np.testing.assert_array_equal(folded, [[2.0, 21.0, 0.0], [7.0, 4.0, 41.0]])
    unscaled = fold.materialize(tree_of(w), adapter.replace(scale_sparse=False))
    np.testing.assert_array_equal(unscaled["dense"]["kernel"], [[2.0, 11.0, 0.0], [7.0, 4.0, 21.0]])


@pytest.mark.parametrize(
    ("rank", "nonzeros", "names"), [(2, 5, {"a", "b", "values"}), (2, 0, {"a", "b"}), (0, 5, {"values"})]
)
def test_zero_rank_or_nonzeros_creates_no_array(rank, nonzeros, names):
    _, adapter = made(Stranger(), jnp.zeros((1, 8)), rank=rank, nonzeros=nonzeros)
    for delta in kernels(adapter.deltas).values():
        assert set(delta) == names
    assert set(tree.flatten(adapter.supports)) == (set(kernels(adapter.deltas)) if nonzeros else set())
    assert count(adapter.deltas) == rank * (8 + 12 + 12 + 12) + 2 * nonzeros


def test_zero_rank_and_nonzeros_create_no_update():
    _, adapter = made(Stranger(), jnp.zeros((1, 8)), rank=0, nonzeros=0, targets=("nothing",))
    assert (adapter.deltas, adapter.supports) == ({}, {})


@pytest.mark.parametrize(("rank", "nonzeros", "trained"), [(16, 0, 589_824), (16, 128, 592_896), (16, 64, 591_360)])
def test_trained_parameters_of_bert_base_equal_the_paper(rank, nonzeros, trained):
    """Query and value of BERT-base, 24 kernels of 768 x 768; the numbers are from the tables of the paper."""
    shape = jax.ShapeDtypeStruct((768, 768), jnp.float32)
    params = {f"layer_{i}": {n: {"kernel": shape} for n in ("query", "value")} for i in range(12)}
    config = DeltaConfig(targets=(".*",), rank=rank, nonzeros=nonzeros, support="random")
    adapter = jax.eval_shape(lambda p: create.init(p, config, key=KEY), params)
    assert count(adapter.deltas) == trained


def test_updates_depend_on_the_key():
    params = Stranger().init(KEY, jnp.zeros((1, 8)))["params"]
    config = DeltaConfig(targets=(".*/kernel",), rank=2, nonzeros=5, support="random")
    first, again, other = (create.init(params, config, key=jax.random.key(seed)) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.deltas["wide"]["kernel"]["a"], other.deltas["wide"]["kernel"]["a"])
    assert not np.array_equal(first.supports["wide"]["kernel"], other.supports["wide"]["kernel"])


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


class Two(nn.Module):
    """Two layers that can run apart."""

    def setup(self):
        self.first, self.second = nn.Dense(8), nn.Dense(8)

    def __call__(self, x):
        return self.second(self.first(x))


def test_update_that_reaches_no_module_is_named():
    x = jnp.zeros((1, 8))
    params, adapter = made(Two(), x)
    run = lambda params, **options: attach.apply(Two(), params, adapter, x, **options)
    with pytest.raises(InputError, match=r"'second/kernel' \(1 of 2 updates\) reached no module: no call in the block"):
        run(params, method=lambda model, x: model.first(x))
    with pytest.raises(InputError, match="'second/kernel' .*no such path.*did you mean 'secnd/kernel'"):
        run({"first": params["first"], "secnd": params["second"]}, method=lambda model, x: model.first(x))
    with attach.attached(adapter):
        Two().apply({"params": params}, x, method=lambda model, x: model.first(x))
        Two().apply({"params": params}, x, method=lambda model, x: model.second(x))


@pytest.mark.parametrize("width", [4, 6])
def test_coordinates_of_a_larger_kernel_are_refused(width):
    """Values alone have the same shapes for kernels of all sizes; JAX drops coordinates out of bounds."""
    params = {"kernel": jnp.zeros((width, 10 - width)), "bias": jnp.zeros(10 - width)}
    adapter = Adapter({"kernel": {"values": jnp.ones(2)}}, {"kernel": jnp.array([[0, 0], [4, 4]])}, 1.0, True)
    message = rf"'kernel' has coordinates up to \(4, 4\); its kernel is \({width}, {10 - width}\)"
    with pytest.raises(InputError, match=message):
        fold.materialize(params, adapter)
    with pytest.raises(InputError, match=message):
        attach.apply(nn.Dense(10 - width), params, adapter, jnp.zeros((1, width)))
    assert jax.eval_shape(fold.materialize, params, adapter)["kernel"].shape == (width, 10 - width)


class Compiled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.Dense)(5)(x)


def test_params_and_updates_are_kept_in_memory_after_the_block():
    """The compiled functions of ``nn.jit`` outlive it."""
    x = jnp.ones((2, 8))
    params, adapter = made(Compiled(), x)
    arrays = [weakref.ref(leaf) for leaf in jax.tree.leaves((params, adapter))]
    attach.apply(Compiled(), params, adapter, x)
    del params, adapter
    gc.collect()
    assert not any(array() is not None for array in arrays)


def test_bfloat16_compute_keeps_small_updates():
    """An update below the last place of the kernel vanishes when folded in 16 bits, and must not when attached."""
    model = nn.Dense(64, dtype=jnp.bfloat16)
    x = jnp.ones((2, 64))
    params = {"kernel": jnp.ones((64, 64)), "bias": jnp.zeros(64)}
    updates = {"kernel": {"a": jnp.full((64, 1), 0.01), "b": jnp.full((1, 64), 0.05)}}
    adapter = Adapter(updates, {}, 1.0, True)
    moved = attach.apply(model, params, adapter, x) - model.apply({"params": params}, x)
    exact = 64 * 0.01 * 0.05
    assert float(jnp.max(jnp.abs(moved.astype(jnp.float32) - exact))) <= 0.25  # one place of bfloat16 at 64
    full = attach.apply(model, jax.tree.map(jnp.zeros_like, params), adapter, x)
    np.testing.assert_allclose(full.astype(jnp.float32), exact, rtol=1e-2)


def test_supports_are_copied_to_the_host_at_each_call(monkeypatch):
    """The coordinates of one array are compared with a shape once; an array of NumPy may change."""
    params = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)}
    support = jnp.array([[0, 0], [4, 3]])
    adapter = Adapter({"kernel": {"values": jnp.ones(2)}}, {"kernel": support}, 1.0, True)
    copies, asarray = [], np.asarray
    monkeypatch.setattr(
        fold.np, "asarray", lambda x, *args, **kwargs: (copies.append(x), asarray(x, *args, **kwargs))[1]
    )
    for _ in range(3):
        attach.apply(nn.Dense(4), params, adapter, jnp.zeros((1, 6)))
        fold.materialize(params, adapter)
    assert sum(copied is support for copied in copies) == 1
    with pytest.raises(InputError, match="has coordinates up to"):
        fold.materialize({"kernel": jnp.zeros((4, 6))}, adapter)
    changing = np.array([[0, 0], [4, 3]])
    adapter = adapter.replace(supports={"kernel": changing})
    fold.materialize(params, adapter)
    changing[1, 1] = 4
    with pytest.raises(InputError, match="has coordinates up to"):
        fold.materialize(params, adapter)


def test_adapter_in_the_bytes_of_flax_is_another_one():
    draw, orientations = np.random.default_rng(0), (("query/kernel", "in_out_out"),)
    part = {name: draw.normal(size=shape) for name, shape in {"a": (4, 2), "b": (2, 6), "values": (3,)}.items()}
    written = Adapter(
        {"query": {"kernel": part}, "out": {"kernel": {"a": part["a"], "b": part["b"]}}},
        {"query": {"kernel": np.arange(6).reshape(3, 2)}},
        1.5,
        False,
        orientations,
    )
    read = serialization.from_bytes(Adapter({}, {}, 1.0, True), serialization.to_bytes(written))
    jax.tree.map(np.testing.assert_array_equal, read, written)
    assert (read.scale, read.scale_sparse, read.orientations) == (1.5, False, orientations)


@pytest.mark.parametrize(
    ("budget", "rank"),
    [(0.05, 1), (0.0874, 1), (0.0875, 2), (0.32, 7), (0.9, 8)],
)
def test_rank_is_the_largest_that_fits_the_budget(budget, rank):
    """Of 2,000 weights: rank r on a stack of two (8, 12) and on one (20, 20) trains 80 r, and 3 kernels 5 values each."""
    params = {"layers": {"kernel": jnp.ones((2, 8, 12))}, "top": {"kernel": jnp.ones((20, 20))}, "rest": jnp.ones(1408)}
    config = DeltaConfig(targets=[".*kernel"], budget=budget, nonzeros=5, alpha=6.0, support="random")
    made = create.with_budget(params, config, 2000)
    assert (made.rank, made.budget, made.scale) == (rank, 0.0, 6.0 / rank)
    deltas = jax.eval_shape(lambda: create.init(params, config, key=KEY)).deltas
    assert count(deltas) == 80 * rank + 15 <= budget * 2000


def test_budget_that_is_too_small_names_the_least():
    params = {"kernel": jnp.ones((20, 20))}
    config = DeltaConfig(targets=["kernel"], budget=0.01, nonzeros=3)
    with pytest.raises(InputError, match=r"delta.budget is 0.01; rank 1 and 3 nonzeros on 1 kernels need 0.107500 of"):
        create.with_budget(params, config, 400)
    assert create.with_budget(params, dataclasses.replace(config, budget=0.1075), 400).rank == 1
