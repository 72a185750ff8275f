"""Tiny models of every family with updates on every kernel, for tests of cuts: masked, compacted and expanded models agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import dsee_jax
import tiny
from dsee_jax import models

LAYERS, HEADS, NEURONS = 2, 3, 40
DELTA = dsee_jax.DeltaConfig(targets=(r"(en|de)coder/.*/kernel",), rank=2, alpha=4.0, nonzeros=9, support="random")
"""Updates on every kernel that is cut, on either axis."""

FAMILIES = {
    **{
        name: (tiny.config(name, num_hidden_layers=LAYERS), "sequence-classification")
        for name in ("bert", "roberta", "xlm-roberta", "deberta", "mpnet")
    },
    "llama": (decoders.config(num_key_value_heads=3), "causal-lm"),
    "llama with biases": (
        decoders.config(num_key_value_heads=3, attention_bias=True, mlp_bias=True),
        "sequence-classification",
    ),
    "mistral": (decoders.config(model_type="mistral", num_key_value_heads=3, sliding_window=4), "causal-lm"),
    "qwen2": (decoders.config(model_type="qwen2", num_key_value_heads=3), "sequence-classification"),
    "gpt2": (decoders.config(model_type="gpt2", n_inner=NEURONS), "causal-lm"),
    "qwen3": (decoders.config(model_type="qwen3", num_key_value_heads=3, head_dim=6), "features"),
}
"""All have the layers, heads (or groups of heads) and neurons above."""


def families(*quick):
    """Parametrize over all families; families outside ``quick`` run in the exhaustive tier."""
    marks = {True: (), False: pytest.mark.exhaustive}
    return pytest.mark.parametrize("family", [pytest.param(name, marks=marks[name in quick]) for name in FAMILIES])


@functools.cache
def whole(family="bert", layers=LAYERS):
    """Return a tiny model with updates everywhere, all in NumPy arrays: ``(model, params, adapter)``."""
    fields, task = FAMILIES[family]
    fields = fields | {"n_layer" if "n_layer" in fields else "num_hidden_layers": layers}
    architecture = models.find(fields["model_type"])
    model = architecture.model(architecture.config.from_hf(fields), task)
    params = tiny.params(model, jnp.zeros((1, 1), jnp.int32))
    return model, params, jax.tree.map(np.asarray, tiny.adapter(params, DELTA, seed=1, spread=0.2))


@functools.cache
def _applied(model):
    return jax.jit(functools.partial(dsee_jax.apply, model))


def logits(model, params, adapter=None):
    batch = tiny.batch(types=model.config.type_vocab_size)
    return np.asarray(_applied(model)(params, adapter, batch))


materialised = jax.jit(dsee_jax.materialize)
"""`dsee_jax.materialize` as one program; uncompiled, it compiles every operation of every shape."""


def close(result, expected):
    np.testing.assert_allclose(result, expected, atol=1e-5 * max(1, np.abs(expected).max()))
