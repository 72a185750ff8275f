"""The optimiser step: its gradients, its constants, and its invariance to padding, order and micro-batches."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compiled
import tiny
from dsee_jax import masks as mask_trees
from dsee_jax import models, tree
from dsee_jax.ckpt import hf
from dsee_jax.config import DeltaConfig, TrainConfig
from dsee_jax.deltas import create
from dsee_jax.errors import InputError
from dsee_jax.prune import earlybert
from dsee_jax.train import optim, step

KEY = jax.random.key(0)
DELTA = DeltaConfig(targets=(".*/(query|up|down)/kernel",), rank=2, nonzeros=5, support="magnitude")
OPTIMIZER = optim.adamw(TrainConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny.bert(tmp_path_factory.mktemp("step") / "base", num_hidden_layers=1, **rates)


def made(folder, *, full=False, dtype="float32"):
    """``(model, state, frozen)``; the updates are perturbed, so that every part of them has a gradient."""
    model, params = hf.load_pretrained(folder, dtype=dtype)
    head = tree.select(["pooler/.*", "classifier/.*"], tree.flatten(params))
    adapter = create.init(params, dataclasses.replace(DELTA, rank=0, nonzeros=0) if full else DELTA, key=KEY)
    noise = np.random.default_rng(0)
    deltas = jax.tree.map(lambda leaf: leaf + noise.normal(0, 0.1, leaf.shape).astype(np.float32), adapter.deltas)
    moving, rest = (params, {}) if full else tree.split(params, head)
    trained = {"deltas": deltas, "params": moving}
    state = step.State(jnp.zeros((), jnp.int32), trained, OPTIMIZER.init(trained))
    return model, state, step.Frozen(rest, adapter.supports, {})


def batch(rows=8, **options):
    inputs = tiny.batch(rows=rows, length=16, **options)
    return inputs | {"labels": np.arange(rows, dtype=np.int32) % 2, "weights": np.ones(rows, np.float32)}


@functools.cache
def program(model, parts):
    """A compiled step, with few optimisations, which are enough for small arrays."""
    function = step.train_step(model, OPTIMIZER, DELTA, parts=lambda _: parts)
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def one_step(model, state, frozen, batch, parts=1):
    return program(model, parts)(state, frozen, batch, KEY, 1e-2)


def products(function, *arguments):
    """Return the sizes (rows, columns) of all matrix products of a function, counted, except A @ B.

    The forward pass may fold ``A @ B`` into a kernel. That product sums over the rank; a gradient sums over rows or tokens.
    """
    sizes = Counter()
    for each, count in compiled.traced_products(function, *arguments).items():
        if each.terms != DELTA.rank:
            sizes[each.rows, each.columns] += count
    return sizes


def test_only_updates_and_head_change_and_have_optimiser_state(folder):
    model, state, frozen = made(folder)
    paths = set(tree.flatten(state.trained))
    assert {path.split("/")[-2] for path in paths if path.startswith("params/")} == {"pooler", "classifier"}
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.trained)} | {()}
    assert {leaf.shape for leaf in jax.tree.leaves(state.optimizer)} <= shapes
    after, _ = one_step(model, state, frozen, batch())
    moved = {
        path
        for path, leaf in tree.flatten(after.trained).items()
        if not np.array_equal(leaf, tree.get(state.trained, path))
    }
    assert moved == paths
    assert int(after.step) == 1


@pytest.mark.parametrize("full", [False, True])
def test_step_computes_no_gradient_of_a_frozen_kernel(folder, full):
    """Width 24, 40 neurons: the only 24 x 24 product of the program is the gradient of the pooler's kernel.

    Full fine-tuning shows that `products` detects such gradients.
    """
    model, state, frozen = made(folder, full=full)
    function = step.train_step(model, OPTIMIZER, DELTA)
    sizes = products(function, state, frozen, batch(), KEY, 1e-2)
    wide, square = sizes[24, 40] + sizes[24, 72], sizes[24, 24]
    if full:
        assert wide >= 3
        assert square >= 2
    else:
        assert (wide, square) == (0, 1)


def variants():
    """Equivalent forms of one batch of 8 rows: ``(batch, micro-batches)``."""
    whole = batch()
    longer = {k: np.pad(x, ((0, 0), (0, 9))) if x.ndim == 2 else x for k, x in whole.items()}
    filled = {k: np.concatenate([x, x[:4]]) for k, x in whole.items()}
    filled["weights"][8:] = 0
    return {
        "padded to a greater length": (longer, 1),
        "in another order": ({k: x[::-1] for k, x in whole.items()}, 1),
        "filled up with rows of weight 0": (filled, 1),
        "accumulated in 2 parts": (whole, 2),
        "accumulated in 8 parts": (whole, 8),
        "filled up, in parts of which one is all filler": (filled, 3),
    }


@pytest.mark.parametrize("name", variants())
def test_padding_order_and_parts_do_not_change_a_step(folder, name):
    model, state, frozen = made(folder)
    expected, expected_loss = one_step(model, state, frozen, batch())
    other, parts = variants()[name]
    state_after, loss = one_step(model, state, frozen, other, parts)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), state_after.trained, expected.trained)


def test_pruned_weights_stay_exactly_zero(folder):
    """Full fine-tuning with momentum and weight decay: pruned weights are bitwise 0.0, the others change."""
    model, state, frozen = made(folder, full=True)
    before = tree.flatten(state.trained["params"])
    paths = tree.select(["encoder/.*/kernel"], before)
    masks = tree.unflatten({path: np.random.default_rng(0).random(before[path].shape) < 0.5 for path in paths})
    # After a dense step the moments of pruned weights are not zero.
    state, _ = one_step(model, state, frozen, batch())
    state = state._replace(trained=state.trained | {"params": mask_trees.apply(state.trained["params"], masks)})
    frozen = frozen._replace(masks=masks)
    for _ in range(2):
        state, _ = one_step(model, state, frozen, batch())
        for path, mask in tree.flatten(masks).items():
            values = np.asarray(tree.get(state.trained["params"], path))
            assert not values[~mask].view(np.uint32).any()
            assert np.all(values[mask] != np.asarray(before[path])[mask])


def test_bfloat16_products_keep_float32_weights(folder):
    model, state, frozen = made(folder, dtype="bfloat16")
    after, loss = one_step(model, state, frozen, batch())
    _, expected = one_step(*made(folder), batch())
    assert float(loss) == pytest.approx(float(expected), rel=0.05)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.trained)} == {jnp.dtype("float32")}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.trained))


def searching(folder, **options):
    """``(state, frozen, step, run)`` of a search whose update is the gradient; coefficients differ from 1."""
    model, state, frozen = made(folder)
    cuts = models.cuts(model)
    noise = np.random.default_rng(1)
    start = earlybert.init(cuts, tree.join(frozen.params, state.trained["params"]))
    coefficients = jax.tree.map(lambda c: jnp.asarray(noise.normal(0, 1, c.shape), jnp.float32), start)
    plain = optax.identity()
    state = step.State(state.step, state.trained | {"coefficients": coefficients}, plain.init(None))
    function = step.train_step(model, plain, DELTA, cuts=cuts, **options)
    quick = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return state, frozen, function, lambda batch: quick(state, frozen, batch, KEY, 1.0)


def test_penalty_changes_coefficients_only(folder):
    """The gradient gains penalty * sign(c), the returned loss excludes the penalty; also with micro-batches."""
    state, _, _, run = searching(folder)
    free, loss = run(batch())
    for parts in (1, 4):
        *_, run = searching(folder, penalty=0.25, parts=lambda _, parts=parts: parts)
        pulled, same = run(batch())
        assert float(same) == pytest.approx(float(loss), rel=1e-5)
        expected = free.trained | {
            "coefficients": jax.tree.map(
                lambda after, c: after - 0.25 * np.sign(c), free.trained["coefficients"], state.trained["coefficients"]
            )
        }
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), pulled.trained, expected)
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), free.trained, state.trained)
    assert all(jax.tree.leaves(moved))


def test_search_computes_no_gradient_of_a_frozen_kernel(folder):
    state, frozen, function, _ = searching(folder, penalty=1e-4)
    sizes = products(function, state, frozen, batch(), KEY, 1.0)
    assert (sizes[24, 40], sizes[24, 72], sizes[24, 24]) == (0, 0, 1)


def test_coefficients_without_cuts_are_refused(folder):
    model, state, frozen = made(folder)
    trained = state.trained | {"coefficients": {"heads": {"layer_0": jnp.ones(3)}}}
    with pytest.raises(InputError, match="heads of layer_0"):
        step.predict(model, trained, frozen, batch(), DELTA)
