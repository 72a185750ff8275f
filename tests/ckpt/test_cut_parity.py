"""Structurally pruned models in Hugging Face transformers on torch: equally cut layers open there with equal logits."""

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
from dsee_jax.prune import compaction, units

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

DECODERS = {
    "llama": 3,
    "llama, biases": 2,
    "llama, heads of their own size": 3,
    "llama, llama3": 3,
    # Ten heads are left, which do not divide the width.
    "mistral": 1,
    "qwen2": 1,
    "qwen2, tied": 3,
    "qwen3": 1,
    "qwen3, biases and windows": 3,
    "gpt2": 0,
    "gpt2, other fields": 0,
}
"""Variant -> the key/value heads, of six in each layer, that are pruned."""


@pytest.fixture
def transformers():
    pytest.importorskip("torch")
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return module


def write(folder, name):
    """Write a random model; return its task and the class of transformers."""
    if name in tiny.FAMILIES:
        tiny.write(folder, tiny.config(name), tiny.weights(tiny.config(name)))
        return "sequence-classification", "AutoModelForSequenceClassification"
    changes = decoders.VARIANTS[name]
    heads = {} if changes.get("model_type") == "gpt2" else {"num_attention_heads": 12, "num_key_value_heads": 6}
    decoders.write(folder, **changes | heads)
    return "causal-lm", "AutoModelForCausalLM"


def cut(source, task, **counts):
    """Return the model without its lowest units, ``counts`` of each layer: ``(model, params, kept)``."""
    model, params = hf.load_pretrained(source, task)
    cuts = models.cuts(model)
    masks = units.structured(params, None, cuts, score="W", scope="tensor", **counts)
    return *dsee_jax.compact(model, params, masks), units.kept(params, cuts, masks)


def opens(transformers, folder, kind, model, params):
    """Assert that transformers opens a folder, uses every tensor, and gives the logits of the model."""
    import torch

    opened, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    batch = tiny.batch(types=model.config.type_vocab_size)
    causal = model.task == "causal-lm"
    batch = {name: x for name, x in batch.items() if not causal or name != "token_type_ids"}
    inputs = {name: torch.from_numpy(np.asarray(x)).long() for name, x in batch.items()}
    if causal:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        actual = opened.eval()(**inputs)[0].numpy()
    expected = np.asarray(jax.jit(model.apply)({"params": params}, **batch))
    seen = batch["attention_mask"] != 0 if causal else slice(None)
    np.testing.assert_allclose(actual[seen], expected[seen], atol=1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*tiny.FAMILIES, *DECODERS])
def test_equally_cut_model_opens(tmp_path, transformers, name):
    task, kind = write(tmp_path / "a", name)
    model, params, kept = cut(tmp_path / "a", task, heads=DECODERS.get(name, 0), neurons=16)
    hf_save.save_pretrained(tmp_path / "b", model, params, source=tmp_path / "a", kept=kept)
    opens(transformers, tmp_path / "b", kind, model, params)


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *DECODERS])
def test_model_of_fewer_layers_opens(tmp_path, transformers, name):
    """No field tells a model without its first layer from an ordinary one; window and rotation stay those of the layer."""
    task, kind = write(tmp_path / "a", name)
    kept = {"layers": np.array([False, True])}
    model, params = dsee_jax.compact(*hf.load_pretrained(tmp_path / "a", task), kept)
    hf_save.save_pretrained(tmp_path / "b", model, params, source=tmp_path / "a", kept=kept)
    opens(transformers, tmp_path / "b", kind, model, params)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", [*(family for family in tiny.FAMILIES if family != "mpnet"), *DECODERS])
def test_narrow_model_opens(tmp_path, transformers, name):
    """Heads of eight entries fill a width of 16 where no field gives their size; the heads of a Llama divide its width.

    The bias of an MPNet has a column for each head of the pretrained model, so its number of heads cannot change.
    """
    task, kind = write(tmp_path / "a", name)
    model, params = hf.load_pretrained(tmp_path / "a", task)
    divided = name in tiny.FAMILIES or name.startswith("gpt2")
    heads = {"heads": {f"layer_{layer}": np.array([True, False, True]) for layer in (0, 1)}} if divided else {}
    width = 16 if divided else 12 if name.startswith("llama") else 17
    kept = heads | {"hidden": np.arange(24) >= 24 - width}
    model, params = dsee_jax.compact(model, params, kept)
    hf_save.save_pretrained(tmp_path / "b", model, params, source=tmp_path / "a", kept=kept)
    opens(transformers, tmp_path / "b", kind, model, params)


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "gpt2", "llama"])
def test_zeros_stand_for_heads_that_the_fields_cannot_hold(tmp_path, transformers, name):
    """The neurons are removed. The Llama keeps ten heads, which do not divide its width."""
    task, kind = write(tmp_path / "a", name)
    model, params, kept = cut(tmp_path / "a", task, heads=1, neurons=16)
    large = compaction.expand(model, params, {"heads": kept["heads"]})
    hf_save.save_pretrained(tmp_path / "b", *large, source=tmp_path / "a", kept={"neurons": kept["neurons"]})
    opens(transformers, tmp_path / "b", kind, model, params)


def test_llama_refuses_heads_that_do_not_divide_the_width(tmp_path, transformers):
    """Therefore such a cut of a Llama is a compact checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps(decoders.config(num_attention_heads=5, head_dim=4)))
    with pytest.raises(Exception, match="hidden size .24. is not a multiple of the number of attention heads .5."):
        transformers.AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_differently_cut_layers_are_described_and_refused(tmp_path, transformers, name):
    """The config and the tokenizer open; no model code of these families reads per_layer_config."""
    task, kind = write(tmp_path / "a", name)
    model, params = hf.load_pretrained(tmp_path / "a", task)
    full = model.config.widths["neurons"][0]
    kept = {"neurons": {f"layer_{layer}": np.arange(full) >= 8 * (layer + 1) for layer in (0, 1)}}
    small, params = dsee_jax.compact(model, params, units.masks(params, models.cuts(model), kept))
    hf_save.save_pretrained(tmp_path / "b", small, params, source=tmp_path / "a", kept=kept)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    field = "n_inner" if name == "gpt2" else "intermediate_size"
    first, second = (getattr(layer, field) for layer in config.per_layer_config)
    assert first - second == 8
    transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    with pytest.raises(Exception, match=f"'{field}' is a per-layer attribute"):
        getattr(transformers, kind).from_pretrained(tmp_path / "b")
