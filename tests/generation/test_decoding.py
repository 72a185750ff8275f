"""Generation against loops without a cache and exhaustive search; for parity see tests/ckpt/test_decoder_parity.py."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import dsee_jax
import tiny
from dsee_jax import models
from dsee_jax.errors import InputError
from dsee_jax.generation import decoding
from dsee_jax.prune import units

PROMPTS = ([7, 9, 11, 6, 8], [10, 12], [5, 20, 30])
FAMILIES = ("llama", "mistral", "gpt2")


@functools.cache
def made(variant="llama", **changes):
    fields = decoders.config(**decoders.VARIANTS[variant], **changes)
    architecture = models.find(fields["model_type"])
    model = architecture.model(architecture.config.from_hf(fields), "causal-lm")
    return model, tiny.params(model, jnp.zeros((1, 1), jnp.int32))


@functools.cache
def whole(model):
    return jax.jit(lambda params, rows: jax.nn.log_softmax(model.apply({"params": params}, rows)))


def log_probs(model, params, rows):
    """Log probabilities of every next token, float64 (rows, length, vocabulary), without a cache."""
    return np.asarray(whole(model)(params, np.asarray(rows, np.int32)), np.float64)


def new(model, params, prompts=PROMPTS, **options):
    return np.asarray(dsee_jax.generate(model, params, *decoding.pad_left(prompts), **options))


@pytest.mark.parametrize("variant", FAMILIES)
def test_greedy_takes_the_most_probable_token(variant):
    """A padded batch equals single prompts, computed without a cache."""
    model, params = made(variant)
    rows = new(model, params, new_tokens=9)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        tokens = [*prompt]
        for token in row:
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(tokens)] = tokens
            assert token == log_probs(model, params, padded)[0, len(tokens) - 1].argmax()
            tokens.append(token)


def test_row_is_padded_after_its_end_of_text():
    model, params = made()
    free = new(model, params, new_tokens=9)
    eos = int(free[0, 4])
    rows = new(model, params, new_tokens=9, eos=(36, eos), pad=3)
    for row, expected in zip(rows, free, strict=True):
        ends = [place for place, token in enumerate(expected) if token in (36, eos)]
        stop = ends[0] + 1 if ends else 9
        np.testing.assert_array_equal(row, [*expected[:stop], *[3] * (9 - stop)])


def test_one_new_token_is_enough():
    model, params = made()
    for options in ({}, {"beams": 3}, {"temperature": 1.0, "key": jax.random.key(0)}):
        assert new(model, params, new_tokens=1, **options).shape == (3, 1)
        # Fewer slots than beams.
        assert new(model, params, [[7]], new_tokens=1, **options).shape == (1, 1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("variant", FAMILIES)
def test_beams_for_every_word_find_the_best_sequence(variant):
    """With one beam per word the search over two tokens is exhaustive."""
    model, params = made(variant)
    words = model.config.vocab_size
    prompt = PROMPTS[0]
    first = log_probs(model, params, [[*prompt, 0]])[0, len(prompt) - 1]
    rows = [[*prompt, word] for word in range(words)]
    second = log_probs(model, params, rows)[:, -1]
    best = np.unravel_index((first[:, None] + second).argmax(), (words, words))
    np.testing.assert_array_equal(new(model, params, [prompt], new_tokens=2, beams=words)[0], best)


@pytest.mark.slow
def test_length_penalty_weighs_scores():
    """An end of text may come first or second; the score of a sequence is its log probability over length ** penalty."""
    model, params = made()
    prompt, words, eos = PROMPTS[2], model.config.vocab_size, 9
    first = log_probs(model, params, [[*prompt, 0]])[0, len(prompt) - 1]
    second = log_probs(model, params, [[*prompt, word] for word in range(words)])[:, -1]
    for penalty in (0.0, 1.0, 3.0):
        scores = {(eos, 0): first[eos]}
        pairs = itertools.product(range(words), range(words))
        scores |= {(a, b): (first[a] + second[a, b]) / 2**penalty for a, b in pairs if a != eos}
        best = max(scores, key=scores.__getitem__)
        tokens = new(model, params, [prompt], new_tokens=2, beams=words, eos=(eos,), length_penalty=penalty)
        np.testing.assert_array_equal(tokens[0], best)


def test_attached_folded_and_compacted_updates_generate_equal_tokens():
    """Greedy and by beams: attached against folded updates, a masked model against the compacted one."""
    model, params = made("llama", num_key_value_heads=3)
    config = dsee_jax.DeltaConfig(targets=("decoder/.*/kernel",), rank=2, alpha=4.0, nonzeros=9, support="random")
    adapter = tiny.adapter(params, config, spread=0.2)
    folded = jax.tree.map(np.asarray, jax.jit(dsee_jax.materialize)(params, adapter))
    cuts = dsee_jax.models.cuts(model)
    left = {"heads": {"layer_0": np.zeros(3, bool), "layer_1": np.array([True, False, True])}}
    masks = units.masks(folded, cuts, left | {"neurons": {"layer_1": np.arange(40) % 2 == 0}})
    small, small_params = dsee_jax.compact(model, folded, masks)
    assert small.config.widths == {"heads": (0, 2), "neurons": (40, 20)}
    for options in ({}, {"beams": 3}):
        attached = new(model, params, adapter=adapter, new_tokens=6, **options)
        np.testing.assert_array_equal(attached, new(model, folded, new_tokens=6, **options))
        masked = new(model, dsee_jax.masks.apply(folded, masks), new_tokens=6, **options)
        np.testing.assert_array_equal(new(small, small_params, new_tokens=6, **options), masked)
        assert (masked != attached).any()


def test_top_k_and_top_p_exclude_tokens():
    """Literals: probabilities 0.5, 0.25, 0.15, 0.1 at temperature 1."""
    logits = jax.device_put(np.log(np.array([[0.25, 0.5, 0.1, 0.15]], np.float32)))
    left = lambda **options: np.isfinite(
        decoding.filter_logits(logits, decoding.Options(**{"temperature": 1.0} | options))
    )[0].tolist()
    assert left() == [True] * 4
    assert left(top_k=2) == [True, True, False, False]
    assert left(top_k=9) == [True] * 4
    assert left(top_p=0.4) == [False, True, False, False]
    assert left(top_p=0.7) == [True, True, False, False]
    assert left(top_p=0.8) == [True, True, False, True]
    assert left(top_k=3, top_p=0.8) == [True, True, False, False]
    # Of equally probable tokens, the first that fill the share.
    equal = decoding.filter_logits(jnp.zeros((1, 4)), decoding.Options(temperature=1.0, top_p=0.5))
    assert np.isfinite(equal).tolist() == [[True, True, False, False]]
    halved = decoding.filter_logits(logits, decoding.Options(temperature=0.5))
    np.testing.assert_allclose(halved, 2 * logits, rtol=1e-6)


def test_samples_follow_the_probabilities():
    """In 2,000 samples the frequency of every word is its probability within four standard errors; the key decides."""
    model, params = made("llama", initializer_range=0.1)
    prompt, draws = list(PROMPTS[0]), 2000
    expected = np.exp(log_probs(model, params, [prompt])[0, -1])
    options = {"new_tokens": 1, "temperature": 1.0}
    samples = new(model, params, [prompt] * draws, key=jax.random.key(1), **options)[:, 0]
    shares = np.bincount(samples, minlength=len(expected)) / draws
    assert (np.abs(shares - expected) <= 4 * np.sqrt(expected * (1 - expected) / draws) + 1e-3).all()
    again, other = (new(model, params, [prompt] * 50, key=jax.random.key(k), **options)[:, 0] for k in (1, 2))
    np.testing.assert_array_equal(again, new(model, params, [prompt] * 50, key=jax.random.key(1), **options)[:, 0])
    assert (again != other).any()
    sharp = new(model, params, new_tokens=5, temperature=1e-4, key=jax.random.key(0))
    np.testing.assert_array_equal(sharp, new(model, params, new_tokens=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "new_tokens is 0; expected 1 or more"),
        ({"beams": 0}, "beams is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p is 0.0; expected a number in \(0, 1\]"),
        ({"top_k": 4}, "give a temperature above 0"),
        ({"beams": 2, "temperature": 1.0}, "beam search does not sample"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number above 0"),
        ({"temperature": 1.0, "new_tokens": 4}, "sampling needs a key"),
        ({"temperature": 1.0, "new_tokens": 4, "key": 0}, "key is 0; expected one PRNG key"),
        ({"new_tokens": 28}, "a prompt of 5 tokens and 28 new ones are more than the model's 32 positions"),
    ],
)
def test_impossible_option_is_named(options, message):
    with pytest.raises(InputError, match=message):
        new(*made("gpt2"), **options)


def test_impossible_prompt_is_named():
    model, params = made()
    for ids, mask in (([[5, 6, 0]], [[1, 1, 0]]), ([[], []], None)):
        with pytest.raises(InputError, match="a prompt has no tokens or is padded on the right"):
            dsee_jax.generate(model, params, np.array(ids, np.int32), mask and np.array(mask))
    for ids, mask, message in (
        ([5, 6], None, r"input_ids is int\d+\(2,\); expected whole numbers \(batch, length\)"),
        ([[0.5, 6.0]], None, r"input_ids is float32\(1, 2\)"),
        ([[5, 6]], [[1]], r"attention_mask is of the shape \(1, 1\); expected \(1, 2\)"),
    ):
        with pytest.raises(InputError, match=message):
            dsee_jax.generate(model, params, np.array(ids), mask and np.array(mask))
    with pytest.raises(InputError, match="the model has the task 'features': load it with task='causal-lm'"):
        dsee_jax.generate(model.clone(task="features"), params, np.array([[5]], np.int32))
    ids, mask = decoding.pad_left([[1, 2], [3]], pad=9, multiple=4)
    assert (ids.tolist(), mask.tolist()) == ([[9, 9, 1, 2], [9, 9, 9, 3]], [[0, 0, 1, 1], [0, 0, 0, 1]])
