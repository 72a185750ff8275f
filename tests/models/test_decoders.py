"""What all decoders hold to: the past alone is seen, packed texts are strangers, a cache changes nothing."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import dsee_jax
import tiny
from dsee_jax import models, tree
from dsee_jax.errors import InputError
from dsee_jax.models import cache as caches

FAMILIES = ("llama", "mistral", "qwen2, windows above", "qwen3, biases and windows", "gpt2")


@functools.cache
def made(variant, task="causal-lm", dtype="float32", **changes):
    fields = decoders.config(**decoders.VARIANTS[variant], **changes)
    architecture = models.find(fields["model_type"])
    model = architecture.model(architecture.config.from_hf(fields, num_labels=3, dtype=dtype), task)
    return model, tiny.params(model, jnp.zeros((1, 1), jnp.int32))


@functools.cache
def jitted(model):
    return jax.jit(model.apply, static_argnames=("deterministic", "last_only"))


def run(model, params, **inputs):
    return jax.tree.map(np.asarray, jitted(model)({"params": params}, **inputs))


def close(actual, expected, tolerance=2e-6):
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def ids(rows=2, length=12):
    return tiny.batch(rows=rows, length=length, padded=False)["input_ids"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_axes_cover_every_param(variant):
    """The first matching rule names every axis of every param, for each task."""
    for task in ("causal-lm", "sequence-classification", "features"):
        model, params = made(variant, task)
        rules = models.find(model.config.model_type).axes
        for path, leaf in tree.flatten(params).items():
            axes = next(axes for pattern, axes in rules if re.fullmatch(pattern, path))
            assert len(axes) == leaf.ndim, path


@pytest.mark.parametrize("variant", FAMILIES)
def test_attention_is_causal(variant):
    model, params = made(variant)
    before = run(model, params, input_ids=ids())
    changed = ids()
    changed[:, 7] = 5 + (changed[:, 7] - 4) % 20
    after = run(model, params, input_ids=changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(before[:, 7:] - after[:, 7:]).max((0, 2)) > 1e-3).all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", FAMILIES)
def test_packed_texts_are_independent(variant):
    """Three texts in one row, with padding between and after: each has the logits of the single text, positions from 0."""
    model, params = made(variant)
    texts = [ids(1, 12)[:, :count] for count in (5, 1, 3)]
    gap = np.zeros((1, 2), np.int32)
    packed = np.concatenate([texts[0], texts[1], gap, texts[2], gap[:, :1]], 1)
    segments = np.array([[1] * 5 + [2] + [0] * 2 + [3] * 3 + [0]], np.int32)
    actual = run(model, params, input_ids=packed, attention_mask=segments)
    assert np.isfinite(actual).all()
    padded = [np.pad(text, ((0, 0), (0, 12 - text.shape[1]))) for text in texts]
    # In batches of two, whose program other tests use too.
    alone = [run(model, params, input_ids=np.concatenate([padded[0], padded[number]])) for number in (1, 2)]
    for text, start, logits in zip(texts, (0, 5, 8), (alone[0][:1], alone[0][1:], alone[1][1:]), strict=True):
        close(actual[:, start : start + text.shape[1]], logits[:, : text.shape[1]], 1e-5)
    positions = np.array([[0, 1, 2, 3, 4, 0, 0, 0, 0, 1, 2, 0]], np.int32)
    close(
        run(model, params, input_ids=packed, attention_mask=segments, positions=positions)[segments > 0],
        actual[segments > 0],
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", FAMILIES)
def test_cache_does_not_change_logits(variant):
    """In parts of 5, 1 and 6 tokens: two packed texts, padding on the left, and a cache with spare capacity."""
    model, params = made(variant)
    batch = {"input_ids": ids(), "attention_mask": np.array([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1] * 12], np.int32)}
    seen = batch["attention_mask"] > 0
    expected, cache, parts = run(model, params, **batch), jax.jit(lambda: caches.create(model, 2, 15))(), []
    for part in (slice(0, 5), slice(5, 6), slice(6, 12)):
        logits, cache = run(model, params, **{name: x[:, part] for name, x in batch.items()}, cache=cache)
        parts.append(logits)
    close(np.concatenate(parts, 1)[seen], np.asarray(expected)[seen])
    assert int(cache["length"]) == 12


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", FAMILIES)
def test_branches_of_a_cache_equal_rows_of_their_own(variant):
    """Three branches of two prompts, one of them padded, take other parents on the way."""
    model, params = made(variant)
    prompts, words, mask = ids(length=6), np.random.default_rng(1).integers(5, 30, (3, 2, 3)), np.ones((2, 6), np.int32)
    mask[0, :2] = 0

    @jax.jit
    def start(params, prompts, mask):
        cache = caches.create(model, 2, 6)
        return caches.branch(model.apply({"params": params}, prompts, attention_mask=mask, cache=cache)[1], 3, 9)

    @jax.jit
    def follow(params, tokens, cache, parents):
        return model.apply({"params": params}, tokens, cache=caches.follow(cache, parents))

    cache = start(params, prompts, mask)
    rows, row = np.repeat(prompts[:, None], 3, 1), np.arange(2)[:, None]
    for parents, tokens in zip(([[0, 1, 2]] * 2, [[2, 2, 0], [1, 0, 1]], [[1, 1, 1], [0, 2, 2]]), words, strict=True):
        logits, cache = follow(params, tokens, cache, np.array(parents))
        rows = np.concatenate([rows[row, parents], tokens[:, :, None]], 2)
        masks = np.concatenate([np.repeat(mask[:, None], 3, 1), np.ones((2, 3, rows.shape[2] - 6), np.int32)], 2)
        # Padded to 9 tokens, so that one program computes the rows of every length.
        padded, masks = (np.pad(x.reshape(6, -1), ((0, 0), (0, 9 - rows.shape[2]))) for x in (rows, masks))
        whole = run(model, params, input_ids=padded, attention_mask=masks)
        close(logits, np.asarray(whole)[:, rows.shape[2] - 1].reshape(logits.shape))


@pytest.mark.parametrize("variant", FAMILIES)
def test_last_only_returns_the_last_logits(variant):
    model, params = made(variant)
    close(run(model, params, input_ids=ids(), last_only=True), run(model, params, input_ids=ids())[:, -1:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_classifier_reads_the_last_token(side):
    """The content of the padding, on either side, does not matter; a single row has the same logits."""
    model, params = made("llama", "sequence-classification")
    batch = decoders.sides(tiny.batch(), side)
    actual = run(model, params, **batch)
    assert actual.shape == (3, 3)
    spoiled = np.where(batch["attention_mask"], batch["input_ids"], 7)
    close(run(model, params, **(batch | {"input_ids": spoiled})), actual)
    alone = batch["input_ids"][2][batch["attention_mask"][2] > 0][None]
    close(run(model, params, input_ids=alone), actual[2:], 1e-5)
    typed = run(model, params, **batch, token_type_ids=np.ones_like(spoiled))
    np.testing.assert_array_equal(typed, actual)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", [*FAMILIES, "llama, biases", "gpt2, not tied"])
def test_attached_equals_materialised(variant):
    """Updates on every kernel, with the joint kernels of query, key and value and of gate and up."""
    model, params = made(variant)
    config = dsee_jax.DeltaConfig(targets=(".*/kernel",), rank=2, alpha=4.0, nonzeros=9, support="random")
    adapter = tiny.adapter(params, config, spread=0.2)
    attached = jax.jit(functools.partial(dsee_jax.apply, model))(params, adapter, {"input_ids": ids()})
    folded = run(model, jax.jit(dsee_jax.materialize)(params, adapter), input_ids=ids())
    close(attached, folded, 1e-5)
    assert np.abs(folded - run(model, params, input_ids=ids())).max() > 0.1


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", FAMILIES)
def test_bfloat16_is_close(variant):
    """Matrix products have 8 bits; norms, rotations, softmax and the result are float32."""
    model, params = made(variant)
    rough, _ = made(variant, dtype="bfloat16")
    actual = run(rough, params, input_ids=ids())
    assert actual.dtype == jnp.float32
    close(actual, run(model, params, input_ids=ids()), 6e-2)


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_dropout_is_in_training_only(variant):
    model, params = made(variant)
    model = model.clone(config=model.config.with_dropout(0.5))
    call = lambda key, **options: jitted(model)(
        {"params": params}, input_ids=ids(), rngs={"dropout": jax.random.key(key)}, **options
    )
    still = call(0)
    assert (call(0, deterministic=False) != still).any()
    assert (call(0, deterministic=False) != call(1, deterministic=False)).any()
    np.testing.assert_array_equal(call(1), still)


def test_too_long_batch_is_refused():
    model, params = made("gpt2")
    with pytest.raises(InputError, match=re.escape("33 tokens long and the model has 32 positions")):
        run(model, params, input_ids=np.ones((1, 33), np.int32))
    outside = run(model, params, input_ids=ids(), positions=np.full((2, 12), 32, np.int32))
    assert np.isnan(outside).all()


def test_gradients_of_padding_are_finite():
    model, params = made("qwen3, biases and windows")
    loss = lambda params: jnp.sum(model.apply({"params": params}, ids(), np.zeros((2, 12), np.int32)) ** 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))
