"""Masks: exact selection, intersection, and files."""

from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from dsee_jax import counts, masks
from dsee_jax.ckpt import packed_masks
from dsee_jax.errors import InputError


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_apply_leaves_positive_zero_and_no_nan(dtype):
    w = jnp.array([[-1.0, jnp.nan], [-jnp.inf, -2.0]], dtype)
    bias = jnp.array([jnp.nan, -1.0])
    kept = jnp.array([[False, False], [False, True]])
    out = masks.apply({"q": {"kernel": w, "bias": bias}}, {"q": {"kernel": kept}})
    assert out["q"]["kernel"].dtype == dtype
    assert out["q"]["kernel"].astype(jnp.float32).tolist() == [[0.0, 0.0], [0.0, -2.0]]
    assert not jnp.signbit(out["q"]["kernel"]).tolist()[0][0]
    assert out["q"]["bias"] is bias


def test_misshapen_mask_is_refused():
    with pytest.raises(InputError, match="did you mean 'q/kernel'"):
        masks.apply({"q": {"kernel": jnp.ones((2, 2))}}, {"q": {"kernle": jnp.ones((2, 2), bool)}})
    with pytest.raises(InputError, match=r"'q/kernel' has the shape \(2,\)"):
        masks.apply({"q": {"kernel": jnp.ones((2, 2))}}, {"q": {"kernel": jnp.ones(2, bool)}})


class Layer(NamedTuple):
    w: Any
    bias: Any


def test_keep_trains_a_pruned_model_that_stays_pruned():
    """With momentum and weight decay; in a tree of any types, frozen in part, with masks at some paths only."""
    params = {"layers": [Layer(jnp.ones((3, 2)), jnp.ones(2))], "head": jnp.ones((2, 2)), "frozen": jnp.ones((2, 2))}
    kept = jnp.array([[True, False], [False, True], [True, True]])
    tree = {"layers": {"0": {"w": kept}}, "frozen": jnp.zeros((2, 2), bool)}
    params["layers"][0] = params["layers"][0]._replace(w=jnp.where(kept, params["layers"][0].w, 0))
    inner = optax.chain(optax.adamw(0.1), masks.keep(tree))
    labels = {"layers": "train", "head": "train", "frozen": "stop"}
    optimizer = optax.multi_transform({"train": inner, "stop": optax.set_to_zero()}, labels)
    state = optimizer.init(params)
    new = params
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, params), state, new)
        new = optax.apply_updates(new, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_array_equal(new["layers"][0].w != 0, kept)
    assert (new["head"] != params["head"]).all()
    assert (new["frozen"] == 1).all()
    none = {**params, "frozen": None}
    assert masks.keep(tree).update(none, masks.keep(tree).init(none))[0]["frozen"] is None


def test_keep_takes_changed_masks_without_compiling_again():
    @jax.jit
    def step(params, state, tree):
        return optax.chain(optax.sgd(1.0, 0.9), masks.keep(tree)).update(params, state, params)

    params = {"w": jnp.ones(4)}
    state = optax.chain(optax.sgd(1.0, 0.9), masks.keep({})).init(params)
    for count in (4, 3, 1):
        updates, state = step(params, state, {"w": jnp.arange(4) < count})
        assert int((updates["w"] != 0).sum()) == count
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"q": {"kernel": np.ones((2, 1), bool)}}, r"mask of 'q/kernel' has the shape \(2, 1\), its update \(2, 2\)"),
        (
            {"params": {"q": {"kernel": np.ones((2, 2), bool)}}},
            "masks begin with 'params/q/kernel', the updates with 'q/kern",
        ),
    ],
)
def test_keep_refuses_masks_that_fit_no_update(tree, message):
    params = {"q": {"kernel": jnp.ones((2, 2))}}
    for call in (lambda: masks.keep(tree).init(params), lambda: masks.keep(tree).update(params, optax.EmptyState())):
        with pytest.raises(InputError, match=message):
            call()


def test_density_literals():
    tree = {"a": np.array([True, False, False]), "b": {"c": np.array([[True]])}}
    assert masks.density(tree) == 0.5
    assert masks.density({}) == 1


def test_density_is_exact_beyond_an_int32_and_works_under_jit(monkeypatch):
    assert jax.jit(masks.density)({"a": jnp.arange(6).reshape(2, 3) < 4}) == np.float32(4 / 6)
    monkeypatch.setattr(masks.counts, "true", lambda parts: counts.of(3 * 2**30 + 1))
    assert masks.density({"a": jnp.ones((2, 2), bool), "b": np.ones(4, bool)}) == (3 * 2**30 + 5) / 8


def test_intersect_takes_a_missing_mask_as_all_kept():
    a = {"x": np.array([True, True, False]), "y": np.array([False])}
    b = {"x": np.array([True, False, True]), "z": np.array([True])}
    both = masks.intersect(a, b)
    assert {path: mask.tolist() for path, mask in both.items()} == {
        "x": [True, False, False],
        "y": [False],
        "z": [True],
    }


def test_pack_literal():
    assert packed_masks.pack(np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1]], bool)).tolist() == [0b10000001, 0b10000000]


@hypothesis.given(hnp.arrays(bool, hnp.array_shapes(max_dims=3, min_side=0, max_side=9)))
@hypothesis.settings(max_examples=50, deadline=None)
def test_unpack_inverts_pack(mask):
    np.testing.assert_array_equal(packed_masks.unpack(packed_masks.pack(mask), mask.shape), mask)


@hypothesis.given(st.integers(0, 2**32 - 1))
@hypothesis.settings(
    max_examples=5, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_masks_are_read_back(tmp_path, seed):
    """Also for transposed and JAX arrays; one bit per entry; no other file remains in the folder."""
    draw = np.random.default_rng(seed)
    tree = {
        "q": {"kernel": (draw.random((64, 30)) > 0.5).T},
        "k": {"kernel": jnp.asarray(draw.random((3, 8, 5)) > 0.5)},
    }
    packed_masks.save(tmp_path / "masks.safetensors", tree)
    back = packed_masks.load(tmp_path / "masks.safetensors")
    np.testing.assert_array_equal(back["q"]["kernel"], tree["q"]["kernel"])
    np.testing.assert_array_equal(back["k"]["kernel"], tree["k"]["kernel"])
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]
    assert (tmp_path / "masks.safetensors").stat().st_size < 64 * 30 // 8 + 3 * 8 * 5 // 8 + 600


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.safetensors"):
        packed_masks.load(tmp_path / "none.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0")
    with pytest.raises(InputError, match="damaged.safetensors"):
        packed_masks.load(tmp_path / "damaged.safetensors")
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not one of masks"):
        packed_masks.load(tmp_path / "other.safetensors")
