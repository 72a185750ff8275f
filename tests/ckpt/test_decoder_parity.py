"""Decoders against Hugging Face transformers on torch: logits of every option, with and without padding and cache."""

import json
import logging

import jax
import numpy as np
import pytest

import decoders
import dsee_jax
import tiny
from dsee_jax import models
from dsee_jax.ckpt import hf, hf_save
from dsee_jax.generation import decoding
from dsee_jax.models import cache as caches

CACHED = ("llama", "llama, llama3", "llama, yarn", "mistral", "qwen2, windows above", "qwen3", "gpt2")
"""The variants whose logits are also computed in parts, through a cache."""

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def _made(folder, kind, fields):
    """Write a random model by transformers, with noise on all vectors and ``fields`` as ``config.json``; return the model."""
    torch = pytest.importorskip("torch")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, kind).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "config.json").rename(folder / "written.json")
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def _hf_logits(model, batch):
    import torch

    inputs = {name: torch.from_numpy(x).long() for name, x in batch.items()}
    if "attention_mask" in inputs:
        # As in the generation of transformers; our models do so by default.
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs)[0].numpy()


def _close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_logits(tmp_path, variant):
    """Without padding, with padding on either side (at all tokens), and in parts through a cache."""
    reference = _made(tmp_path / "a", "AutoModelForCausalLM", decoders.config(**decoders.VARIANTS[variant]))
    model, params = hf.load_pretrained(tmp_path / "a", "causal-lm")
    run = jax.jit(model.apply, static_argnames="last_only")
    for side in ("right", "left"):
        for padded in (False, True) if side == "right" else (True,):
            batch = decoders.sides(tiny.batch(padded=padded), side)
            seen = batch["attention_mask"] != 0
            actual, expected = np.asarray(run({"params": params}, **batch)), _hf_logits(reference, batch)
            _close(actual[seen], expected[seen])
    # The config.json from transformers has other fields for the same model.
    (tmp_path / "a" / "written.json").rename(tmp_path / "a" / "config.json")
    again, _ = hf.load_pretrained(tmp_path / "a", "causal-lm")
    np.testing.assert_array_equal(jax.jit(again.apply)({"params": params}, **batch), actual)
    if variant not in CACHED:
        return
    cache = caches.create(model, 3, 20)
    parts = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
        logits, cache = run({"params": params}, **{name: x[:, part] for name, x in batch.items()}, cache=cache)
        parts.append(np.asarray(logits))
    _close(np.concatenate(parts, 1)[seen], expected[seen])


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_classification_reads_the_last_token(tmp_path, variant):
    fields = decoders.config(**decoders.VARIANTS[variant])
    reference = _made(tmp_path / "a", "AutoModelForSequenceClassification", fields | {"num_labels": 3})
    model, params = hf.load_pretrained(tmp_path / "a", num_labels=3)
    for side in ("right", "left"):
        batch = decoders.sides(tiny.batch(), side)
        _close(np.asarray(jax.jit(model.apply)({"params": params}, **batch)), _hf_logits(reference, batch))


SEARCHES = (
    {},
    {"beams": 3},
    {"beams": 4, "length_penalty": 2.0, "early_stopping": True},
    {"beams": 2, "length_penalty": -1.0},
)


def _search(reference, ids, mask, *, new_tokens, eos, pad, beams=1, **options):
    """Return the tokens that transformers generates, padded like ours."""
    import torch

    options |= {"num_beams": beams, "max_new_tokens": new_tokens, "eos_token_id": list(eos) or None}
    actual = reference.generate(
        torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(mask).long(),
        do_sample=False,
        pad_token_id=pad,
        **options,
    )
    actual = actual.numpy()[:, ids.shape[1] :]
    return np.pad(actual, ((0, 0), (0, new_tokens - actual.shape[1])), constant_values=pad)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", SEARCHES, ids=str)
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2, windows above", "qwen3", "gpt2"])
def test_generated_tokens(tmp_path, variant, options):
    """Greedy and beam search on a batch padded on the left, with several frequent end tokens."""
    reference = _made(tmp_path / "a", "AutoModelForCausalLM", decoders.config(**decoders.VARIANTS[variant]))
    model, params = hf.load_pretrained(tmp_path / "a", "causal-lm")
    ids, mask = decoding.pad_left([[7, 9, 11, 6, 8], [10, 12], [5, 20, 30], [6]])
    for eos in ((), (8, 17, 22)):
        settings = {"new_tokens": 12, "eos": eos, "pad": 1} | options
        actual = dsee_jax.generate(model, params, ids, mask, **settings)
        np.testing.assert_array_equal(actual, _search(reference, ids, mask, **settings))


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_repetition_is_penalized(tmp_path, beams):
    """Prompts have one length: Hugging Face counts padding as repeated tokens."""
    reference = _made(tmp_path / "a", "AutoModelForCausalLM", decoders.config())
    model, params = hf.load_pretrained(tmp_path / "a", "causal-lm")
    ids = np.array([[7, 9, 11, 6, 8], [10, 12, 10, 5, 5]], np.int32)
    settings = {"new_tokens": 12, "eos": (), "pad": 1, "beams": beams}
    plain = dsee_jax.generate(model, params, ids, **settings)
    for penalty in (1.7, 0.6):
        actual = dsee_jax.generate(model, params, ids, repetition_penalty=penalty, **settings)
        expected = _search(reference, ids, np.ones_like(ids), repetition_penalty=penalty, **settings)
        np.testing.assert_array_equal(actual, expected)
        assert (np.asarray(actual) != np.asarray(plain)).any()


@pytest.mark.parametrize("variant", ["llama, linear", "llama, dynamic", "llama, yarn"])
def test_generation_beyond_the_pretraining_length(tmp_path, variant):
    fields = decoders.config(**decoders.VARIANTS[variant])
    reference = _made(tmp_path / "a", "AutoModelForCausalLM", fields)
    model, params = hf.load_pretrained(tmp_path / "a", "causal-lm")
    ids, mask = decoding.pad_left([[7, 9, 11, 6, 8, 5]])
    new = model.config.longest - 6
    assert new + 6 > fields["max_position_embeddings"]
    settings = {"new_tokens": new, "eos": (), "pad": 1}
    np.testing.assert_array_equal(
        dsee_jax.generate(model, params, ids, mask, **settings), _search(reference, ids, mask, **settings)
    )


def test_written_classifier_takes_several_texts(tmp_path):
    """The source has no padding id: Hugging Face's class needs one for two or more rows."""
    torch = pytest.importorskip("torch")
    import transformers

    decoders.write(tmp_path / "a", model_type="gpt2", pad_token_id=None)
    model, params = hf.load_pretrained(tmp_path / "a", "sequence-classification", 3)
    hf_save.save_pretrained(tmp_path / "b", model, params, source=tmp_path / "a")
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "b").eval()
    batch = decoders.sides(tiny.batch(pad=reference.config.pad_token_id), "right")
    actual = np.asarray(jax.jit(model.apply)({"params": params}, **batch))
    inputs = {name: torch.from_numpy(batch[name]).long() for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        _close(actual, reference(**inputs).logits.numpy())


TEXT = (
    "One day, a small frog sat by the pond and looked at the moon. The frog wanted to jump very high. "
    "His friend, the duck, said that no frog could ever reach it, but the frog was brave and tried again and again."
)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_real_llama_generates_equal_texts(shared, options):
    """Released weights, three prompts in one batch, token by token."""
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "data" / "stories260k"
    tokenizer, reference = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    model, params = hf.load_pretrained(folder, "causal-lm")
    prompts = ("Once upon a time, there was a little girl named Lily.", "Tom had a dog.", "The sun")
    ids, mask = decoding.pad_left([tokenizer(prompt)["input_ids"] for prompt in prompts])
    settings = {"new_tokens": 80, "eos": (2,), "pad": 1} | options
    actual = dsee_jax.generate(model, params, ids, mask, **settings)
    np.testing.assert_array_equal(actual, _search(reference, ids, mask, **settings))


def test_real_llama_has_equal_perplexity(shared):
    """On an unseen text."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "data" / "stories260k"
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="np")["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = float(reference(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss.exp())
    model, params = hf.load_pretrained(folder, "causal-lm")
    logits = jax.jit(model.apply)({"params": params}, ids)
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[0, :-1], ids[0, 1:, None], 1)
    assert float(np.exp(-chosen.mean())) == pytest.approx(expected, rel=1e-5)
    assert 2 < expected < 30


@pytest.mark.parametrize("variant", ["llama, biases", "mistral, no window", "qwen3", "gpt2", "gpt2, not tied"])
def test_written_model_gives_equal_logits(tmp_path, variant):
    """Changed params of language model and classifier, written in shards, opened by transformers."""
    import transformers

    torch = pytest.importorskip("torch")
    source, batch = decoders.write(tmp_path / "a", **decoders.VARIANTS[variant]), tiny.batch(padded=False)
    batch = {"input_ids": batch["input_ids"]}
    for task, kind in (
        ("causal-lm", "AutoModelForCausalLM"),
        ("sequence-classification", "AutoModelForSequenceClassification"),
    ):
        model, params = hf.load_pretrained(source, task)
        params = jax.tree.map(lambda leaf: 0.9 * leaf, params)
        hf_save.save_pretrained(tmp_path / task, model, params, source=source, max_shard_size="10KB")
        reference = getattr(transformers, kind).from_pretrained(tmp_path / task).eval()
        assert type(reference).__name__ == models.class_name(model)
        with torch.no_grad():
            expected = reference(torch.from_numpy(batch["input_ids"]).long())[0].numpy()
        _close(np.asarray(jax.jit(model.apply)({"params": params}, **batch)), expected)
