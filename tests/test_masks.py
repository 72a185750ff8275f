"""Masks: exact selection, intersection, and files."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dsee_jax import masks
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


def test_density_literals():
    tree = {"a": np.array([True, False, False]), "b": {"c": np.array([[True]])}}
    assert masks.density(tree) == 0.5
    assert masks.density({}) == 1


def test_density_adds_parts_beyond_an_int32(monkeypatch):
    """A mask of 40 layers of 5120 x 13824 counts by layer; the sum of the counts exceeds an int32."""
    assert masks.parts((40, 5120, 13824)) == 1
    assert masks.parts((13824, 5120)) == masks.parts(()) == 0
    assert masks.parts((2, 70000, 70000)) == 2
    layered = jnp.arange(24).reshape(2, 3, 4) % 5 == 0
    for most, axes in ((25, ()), (24, (2,)), (12, (2, 3)), (4, (2, 3, 4))):
        counts = masks.counts(layered, most)
        assert counts.shape == axes
        assert int(counts.sum()) == 5
    monkeypatch.setattr(masks, "counts", lambda mask: jnp.full(3, 2**30, jnp.int32))
    assert masks.density({"a": jnp.ones((2, 2), bool)}) == 3 * 2**30 / 4


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
