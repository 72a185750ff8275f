"""Orientations: a kernel of any axes and its matrix, and updates and scores of it, agree with those of a 2-D kernel."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import dsee_jax
from dsee_jax import deltas, orientation, prune


@st.composite
def oriented_shapes(draw, sizes=(2, 3)):
    """Draw an orientation and the shape of a kernel: at most two stacks, two inputs, two outputs and two axes of length 1."""
    counts = {"in": st.integers(1, 2), "out": st.integers(1, 2), "stack": st.integers(0, 2), "1": st.integers(0, 2)}
    words = draw(st.permutations([word for word, count in counts.items() for _ in range(draw(count))]))
    return "_".join(words), tuple(1 if word == "1" else draw(st.sampled_from(sizes)) for word in words)


def matrix_by_hand(w, axes):
    """Return the matrix (stack..., in, out) of a kernel, entry by entry."""
    words = axes.split("_")
    sizes = {
        word: [size for size, own in zip(w.shape, words, strict=True) if own == word] for word in ("stack", "in", "out")
    }
    matrix = np.zeros((*sizes["stack"], np.prod(sizes["in"]), np.prod(sizes["out"])), w.dtype)
    for index, value in np.ndenumerate(w):
        at = {word: [place for place, own in zip(index, words, strict=True) if own == word] for word in sizes}
        row, column = (np.ravel_multi_index(at[word], sizes[word]) for word in ("in", "out"))
        matrix[(*at["stack"], row, column)] = value
    return matrix


@hypothesis.given(oriented_shapes())
@hypothesis.settings(max_examples=50)
def test_the_matrix_of_a_kernel_is_that_of_its_axes_and_gives_it_back(drawn):
    axes, shape = drawn
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    matrix = orientation.matrix(w, axes)
    assert orientation.matrix_shape(shape, axes) == matrix.shape
    np.testing.assert_array_equal(matrix, matrix_by_hand(w, axes))
    np.testing.assert_array_equal(orientation.tensor(matrix, w, axes), w)


def adapter_of(params, rule, key):
    config = dsee_jax.DeltaConfig(targets=(rule,), rank=1, nonzeros=2, support="magnitude", alpha=2.0)
    adapter = deltas.init(params, config, key=key)
    draw = np.random.default_rng(0)
    grown = jax.tree.map(lambda leaf: jnp.asarray(draw.normal(size=leaf.shape), jnp.float32), adapter.deltas)
    return adapter.replace(deltas=grown)


@hypothesis.given(oriented_shapes(sizes=(2,)), st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=5)
def test_updates_of_an_oriented_kernel_are_those_of_its_matrix(drawn, seed):
    """Created and folded; the kernels of a stack keep their own supports."""
    axes, shape = drawn
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    matrix = jnp.asarray(matrix_by_hand(np.asarray(w), axes))
    adapter = adapter_of({"kernel": w}, ("kernel", {"orientation": axes}), jax.random.key(seed))
    stacks = "stack_" * (matrix.ndim - 2)
    reference = adapter_of({"kernel": matrix}, ("kernel", {"orientation": f"{stacks}in_out"}), jax.random.key(seed))
    jax.tree.map(np.testing.assert_array_equal, adapter.deltas, reference.deltas)
    jax.tree.map(np.testing.assert_array_equal, adapter.supports, reference.supports)
    folded = dsee_jax.materialize({"kernel": w}, adapter)["kernel"]
    expected = dsee_jax.materialize({"kernel": matrix}, reference)["kernel"]
    assert folded.shape == shape
    np.testing.assert_allclose(matrix_by_hand(np.asarray(folded), axes), expected, rtol=1e-6)


@hypothesis.given(
    st.sampled_from(["out_in", "in_in_out", "out_in_out", "stack_out_in", "1_out_in"]), st.integers(0, 99)
)
@hypothesis.settings(max_examples=5)
def test_scores_of_an_oriented_kernel_are_those_of_its_matrix(axes, seed):
    shape = tuple(1 if word == "1" else 4 for word in axes.split("_"))
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    matrix = jnp.asarray(matrix_by_hand(np.asarray(w), axes))
    rule = ("kernel", {"orientation": axes})
    adapter = adapter_of({"kernel": w}, rule, jax.random.key(seed))
    stacks = "stack_" * (matrix.ndim - 2)
    plain = ("kernel", {"orientation": f"{stacks}in_out"})
    reference = adapter_of({"kernel": matrix}, plain, jax.random.key(seed))
    for draw, options in ((prune.unstructured, {"scope": "output"}), (prune.nm, {"n": 1, "m": 2})):
        mask = draw({"kernel": w}, adapter, [rule], **options)["kernel"]
        expected = draw({"kernel": matrix}, reference, [plain], **options)["kernel"]
        assert mask.shape == shape
        np.testing.assert_array_equal(matrix_by_hand(np.asarray(mask), axes), expected)
