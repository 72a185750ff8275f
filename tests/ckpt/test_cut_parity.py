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
from dsee_jax.prune import units

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


def cut(source, out, task, draw):
    """Write the model with the units that ``draw`` keeps; return its logits and their batch."""
    model, params = hf.load_pretrained(source, task)
    kept = draw(model, params)
    small, params = dsee_jax.compact(model, params, units.masks(params, models.cuts(model), kept))
    hf_save.save_pretrained(out, small, params, source=source, kept=kept)
    types = model.config.type_vocab_size
    batch = tiny.batch(types=types)
    batch = batch if types else {name: x for name, x in batch.items() if name != "token_type_ids"}
    return np.asarray(jax.jit(small.apply)({"params": params}, **batch)), batch


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *DECODERS])
def test_equally_cut_model_opens(tmp_path, transformers, name):
    """Every tensor of the folder is used, and none is missing or of another shape."""
    import torch

    task, kind = write(tmp_path / "a", name)

    def draw(model, params):
        cuts, options = models.cuts(model), {"heads": DECODERS.get(name, 0), "neurons": 16}
        return units.kept(params, cuts, units.structured(params, None, cuts, **options, score="W", scope="tensor"))

    expected, batch = cut(tmp_path / "a", tmp_path / "b", task, draw)
    opened, report = getattr(transformers, kind).from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(report.values())
    inputs = {name: torch.from_numpy(np.asarray(x)).long() for name, x in batch.items()}
    if task == "causal-lm":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        actual = opened.eval()(**inputs)[0].numpy()
    seen = batch["attention_mask"] != 0 if task == "causal-lm" else slice(None)
    np.testing.assert_allclose(actual[seen], expected[seen], atol=1e-5)


def test_llama_refuses_heads_that_do_not_divide_the_width(tmp_path, transformers):
    """Therefore such a cut of a Llama is a compact checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps(decoders.config(num_attention_heads=5, head_dim=4)))
    with pytest.raises(Exception, match="hidden size .24. is not a multiple of the number of attention heads .5."):
        transformers.AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mistral", "qwen2", "qwen3"])
def test_differently_cut_layers_are_described_and_refused(tmp_path, transformers, name):
    """The config and the tokenizer open; no model code of these families reads per_layer_config."""
    task, kind = write(tmp_path / "a", name)

    def neurons(model, params):
        full = model.config.widths["neurons"]
        return {"neurons": {f"layer_{layer}": np.arange(full[0]) >= 8 * (layer + 1) for layer in (0, 1)}}

    cut(tmp_path / "a", tmp_path / "b", task, neurons)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    field = "n_inner" if name == "gpt2" else "intermediate_size"
    first, second = (getattr(layer, field) for layer in config.per_layer_config)
    assert first - second == 8
    transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    with pytest.raises(Exception, match=f"'{field}' is a per-layer attribute"):
        getattr(transformers, kind).from_pretrained(tmp_path / "b")
