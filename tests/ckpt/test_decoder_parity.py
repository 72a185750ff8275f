"""Decoders against Hugging Face transformers on torch: logits of every option, with and without padding and cache."""

import json
import logging

import jax
import numpy as np
import pytest

import decoders
import tiny
from dsee_jax.ckpt import hf
from dsee_jax.models import cache as caches

CACHED = ("llama", "mistral", "qwen2, windows above", "qwen3", "gpt2")
"""Of these the same logits are asked for in parts, through a cache."""

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def _made(folder, kind, fields):
    """A model that transformers draws and writes, every vector moved from its start; ``config.json`` as it is given."""
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
    (folder / "config.json").write_text(json.dumps(fields))
    return model


def _theirs(model, batch):
    import torch

    given = {name: torch.from_numpy(x).long() for name, x in batch.items()}
    if "attention_mask" in given:
        # What its generation does, and what ours does of itself.
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**given)[0].numpy()


def _close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("variant", decoders.VARIANTS)
def test_logits(tmp_path, variant):
    """Unpadded; padded on either side, where there is a token; in two parts through a cache."""
    theirs = _made(tmp_path / "a", "AutoModelForCausalLM", decoders.config(**decoders.VARIANTS[variant]))
    model, params = hf.load_pretrained(tmp_path / "a", "causal-lm")
    run = jax.jit(model.apply, static_argnames="last_only")
    for side in ("right", "left"):
        for padded in (False, True) if side == "right" else (True,):
            batch = decoders.sides(tiny.batch(padded=padded), side)
            seen = batch["attention_mask"] != 0
            found, expected = np.asarray(run({"params": params}, **batch)), _theirs(theirs, batch)
            _close(found[seen], expected[seen])
    if variant not in CACHED:
        return
    cache = caches.create(model.config, 3, 20)
    parts = []
    for part in (slice(0, 7), slice(7, 8), slice(8, 12)):
        logits, cache = run({"params": params}, **{name: x[:, part] for name, x in batch.items()}, cache=cache)
        parts.append(np.asarray(logits))
    _close(np.concatenate(parts, 1)[seen], expected[seen])


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_classification_reads_the_last_token(tmp_path, variant):
    fields = decoders.config(**decoders.VARIANTS[variant])
    theirs = _made(tmp_path / "a", "AutoModelForSequenceClassification", fields | {"num_labels": 3})
    model, params = hf.load_pretrained(tmp_path / "a", num_labels=3)
    for side in ("right", "left"):
        batch = decoders.sides(tiny.batch(), side)
        _close(np.asarray(jax.jit(model.apply)({"params": params}, **batch)), _theirs(theirs, batch))
