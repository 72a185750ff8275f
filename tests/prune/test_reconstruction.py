"""SparseGPT on one matrix equals exact least squares, keeps exact counts, and loses less than plain masks; then on trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsee_jax
from dsee_jax import prune, tree
from dsee_jax.errors import InputError
from dsee_jax.prune import calibration, reconstruction
from examples import case


def matrix(inputs=24, outputs=9, samples=120):
    """A kernel, and the mean of x x^T of correlated inputs."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(samples, inputs)) @ (np.eye(inputs) + 0.4 * draw.normal(size=(inputs, inputs)))
    return draw.normal(size=(inputs, outputs)).astype(np.float32), (x.T @ x / samples).astype(np.float32)


def error(w, new, gram):
    change = np.asarray(new, np.float64) - np.asarray(w, np.float64)
    return np.trace(change.T @ np.asarray(gram, np.float64) @ change)


def test_pruning_one_input_is_exact_least_squares_of_the_later_ones():
    """Inputs before stay; those after, f, become W_f + H_ff^-1 H_fp W_p with the damped H."""
    w, gram = matrix()
    w += np.sign(w)
    w[15] /= 50  # the lowest scores, and a change that shows
    mask, new = reconstruction.reconstruct(w, gram, sparsity=1 / 24)
    damped = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(24)
    expected = w.astype(np.float64)
    expected[16:] += np.linalg.solve(damped[16:, 16:], damped[16:, 15:16] @ expected[15:16])
    expected[15] = 0
    np.testing.assert_array_equal(mask, np.arange(24)[:, None] != np.full((24, 9), 15))
    assert np.abs(expected - w)[16:].max() > 1e-3
    np.testing.assert_allclose(new, expected, atol=2e-6)
    np.testing.assert_array_equal(new[:15], w[:15])


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=["sparsity", "2:4"])
def test_weights_equal_the_sequence_of_exact_solutions(options):
    """In float64, without a factor of the inverse: input after input, and blocks that do not divide the inputs."""
    w, gram = matrix()
    damped = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(24)
    mask, new = reconstruction.reconstruct(w, gram, block=10, **options)
    expected = w.astype(np.float64)
    for i, kept in enumerate(np.asarray(mask)):
        pruned = np.where(kept, 0, expected[i])
        expected[i] -= pruned
        expected[i + 1 :] += np.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, i : i + 1] @ pruned[None])
    np.testing.assert_allclose(new, expected, atol=3e-5)


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=["sparsity", "2:4"])
def test_changed_weights_lose_less_than_plain_masks(options):
    w, gram = matrix()
    mask, new = reconstruction.reconstruct(w, gram, **options)
    assert (np.asarray(new)[~mask] == 0).all()
    assert error(w, new, gram) < error(w, np.where(mask, w, 0), gram)
    inputs = jnp.sqrt(jnp.diagonal(gram))
    wanda = {"score": "WANDA", "inputs": {"kernel": inputs}}
    params = {"kernel": jnp.asarray(w)}
    plain = (
        prune.nm(params, None, ["kernel"], **wanda)
        if "m" in options
        else prune.unstructured(params, None, ["kernel"], scope="tensor", **wanda)
    )
    assert error(w, new, gram) < error(w, np.where(plain["kernel"], w, 0), gram)


@pytest.mark.parametrize("block", [7, 128])
def test_counts_are_exact_in_blocks_of_any_length(block):
    w, gram = matrix()
    for sparsity in (0.0, 0.37, 0.9):
        mask, new = reconstruction.reconstruct(w, gram, sparsity=sparsity, block=block)
        assert (~np.asarray(mask)).sum() == round(sparsity * 24 * 9)
        if not sparsity:
            np.testing.assert_array_equal(new, w)


def test_blocks_prune_alike_and_groups_are_drawn_from_the_changed_weights():
    """Every block of 7 inputs loses a third; each group of 4 keeps 2, and not those that the first weights would choose."""
    w, gram = matrix()
    mask, _ = reconstruction.reconstruct(w, gram, sparsity=1 / 3, block=7)
    assert (np.asarray(mask)[:21].reshape(3, 7 * 9).sum(1) == 42).all()
    mask, _ = reconstruction.reconstruct(w, gram, n=2, m=4)
    assert (np.asarray(mask).reshape(6, 4, 9).sum(1) == 2).all()
    first = np.square(w / np.sqrt(np.diag(np.linalg.inv(gram)))[:, None])
    assert (np.asarray(mask) != np.asarray(dsee_jax.ops.topk.n_m(jnp.asarray(first), 2, 4))).any()


def test_inputs_that_are_always_zero_go_first_and_change_nothing_else():
    w, gram = matrix()
    gram[3], gram[:, 3] = 0, 0
    mask, new = reconstruction.reconstruct(w, gram, sparsity=1 / 24)
    np.testing.assert_array_equal(mask, np.arange(24)[:, None] != np.full((24, 9), 3))
    np.testing.assert_array_equal(new, np.where(mask, w, 0))
    mask, new = reconstruction.reconstruct(w, np.zeros((24, 24)))
    assert mask.sum() == 12 * 9
    np.testing.assert_array_equal(new, np.where(mask, w, 0))


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"sparsity": 0.25}, {"n": 2, "m": 4}], ids=["sparsity", "fewer go", "2:4"]
)
def test_zeros_go_first_and_stay_zeros(options):
    """As many go as of any matrix; the other weights are the exact solutions with all zeros held at 0."""
    w, gram = matrix()
    zeros = np.random.default_rng(1).random(w.shape) < 0.4
    zeros[8:12] = [[True], [True], [True], [False]]  # a group of four with more zeros than go of it
    w = np.where(zeros, 0, w).astype(np.float32)
    mask, new = (np.asarray(each) for each in reconstruction.reconstruct(w, gram, block=12, **options))
    assert (new[zeros] == 0).all()
    rows, goes = (4, 2) if "m" in options else (12, round(options["sparsity"] * 12 * 9))
    columns = 1 if "m" in options else 9
    pruned, others = (each.reshape(-1, rows, 9 // columns, columns).sum((1, 3)) for each in (~mask, ~mask & ~zeros))
    assert (pruned == goes).all()
    left = goes - zeros.reshape(-1, rows, 9 // columns, columns).sum((1, 3))
    assert left.min() < 0 or goes == 54
    np.testing.assert_array_equal(others, np.maximum(left, 0))
    damped = gram.astype(np.float64) + 0.01 * np.mean(np.diag(gram)) * np.eye(24)
    expected = w.astype(np.float64)
    for i, stays in enumerate(mask & ~zeros):
        pruned = np.where(stays, 0, expected[i])
        expected[i] -= pruned
        expected[i + 1 :] += np.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, i : i + 1] @ pruned[None])
    np.testing.assert_allclose(new, expected, atol=3e-5)


def test_a_matrix_that_is_not_positive_definite_is_an_error():
    with pytest.raises(InputError, match="not positive definite"):
        reconstruction.reconstruct(np.ones((2, 2)), np.array([[1.0, 3.0], [3.0, 1.0]]))


def test_updates_cancel_and_other_orientations_are_the_same():
    """The result is that of the matrix of W alone; a kernel stored (out, in) gives the transposed arrays."""
    w, gram = matrix()
    mask, new = reconstruction.reconstruct(w, gram)
    adapter = dsee_jax.deltas.init(
        {"kernel": jnp.asarray(w)}, dsee_jax.DeltaConfig(targets=["kernel"], rank=2, nonzeros=3), key=jax.random.key(0)
    )
    grams = {"kernel": gram}
    masks, params = prune.sparsegpt({"kernel": jnp.asarray(w)}, adapter, ["kernel"], grams=grams)
    np.testing.assert_array_equal(masks["kernel"], mask)
    np.testing.assert_array_equal(params["kernel"], new)
    rules = [("kernel", {"orientation": "out_in"})]
    masks, params = prune.sparsegpt({"kernel": w.T}, None, rules, grams=grams)
    np.testing.assert_array_equal(masks["kernel"], mask.T)
    np.testing.assert_array_equal(params["kernel"], new.T)
    stacked = {"layers": {"kernel": jnp.stack([jnp.asarray(w)] * 2)}}
    masks, params = prune.sparsegpt(stacked, None, ["kernel"], grams={"layers/kernel": np.stack([gram, gram])})
    np.testing.assert_array_equal(params["layers"]["kernel"][1], new)


def test_bad_input_names_the_fix():
    params = {"kernel": jnp.ones((4, 2))}
    with pytest.raises(
        InputError, match=r"'kernel' needs grams of the shape \(4, 4\); found nothing: pass grams=dsee_jax"
    ):
        prune.sparsegpt(params, None, ["kernel"], grams={})
    with pytest.raises(InputError, match="'kernel': 2:3 needs groups of 3 inputs"):
        prune.sparsegpt(params, None, ["kernel"], grams={"kernel": jnp.eye(4)}, n=2, m=3)
    with pytest.raises(InputError, match="damping is 0"):
        prune.sparsegpt(params, None, ["kernel"], grams={"kernel": jnp.eye(4)}, damping=0)
    with pytest.raises(InputError, match=r"call dsee_jax\.prune\.sparsegpt"):
        prune.unstructured(params, None, ["kernel"], score="SPARSEGPT")


@pytest.mark.slow
def test_grams_are_means_over_all_batches(tmp_path):
    model, params, batch = case(tmp_path / "hf")
    grams = calibration.grams(model, params, [batch, batch])
    path = "encoder/layer_0/mlp/up/kernel"
    part = calibration.gram(model, params, batch)[path]
    np.testing.assert_allclose(grams[path], part["sum"] / part["count"], atol=1e-5)
    assert grams.keys() == {path for path in tree.flatten(params) if path.endswith("/kernel")}
