"""Architectures by Hugging Face's ``model_type``.

A module of this table has ``Config`` (with ``from_hf``, ``longest``, ``widths``, ``with_widths``), ``Model(config, task)``,
and the tables ARCHITECTURES, HEAD, PREFIX, HF_NAMES, OLD_NAMES, IGNORED_NAMES, AXES and CUTS: all that generic code may know
of an architecture.
"""

import functools
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax import tree
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.models import bert, deberta, gpt2, llama, roberta, xlm_roberta
from dsee_jax.typing import Cuts, Units

MODELS: dict[str, ModuleType] = {
    **{module.Config.model_type: module for module in (bert, deberta, gpt2, roberta, xlm_roberta)},
    **dict.fromkeys(llama.FAMILIES, llama),
}


INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The arrays of a batch that the model takes; ``labels`` and ``weights`` are the loss's."""


def find(model_type: str) -> ModuleType:
    """Return the module of a ``model_type``; raises `InputError` with those there are."""
    if not isinstance(model_type, str) or model_type not in MODELS:
        near = did_you_mean(str(model_type), MODELS)
        raise InputError(f"'model_type' {model_type!r} is not supported{near}; supported: {', '.join(MODELS)}")
    return MODELS[model_type]


def shapes(model: nn.Module) -> dict[str, Any]:
    """Return the params of a model as shapes and dtypes; nothing is computed."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]


def architecture(model: Any) -> str:
    """Return the name of Hugging Face's class of a model with the head of its task."""
    name = find(model.config.model_type).ARCHITECTURES[model.task]
    return name if isinstance(name, str) else name[model.config.model_type]


@functools.lru_cache(maxsize=16)
def cuts(model: Any) -> Cuts:
    """Return what can be cut out of a model: its architecture's CUTS, written out for every layer.

    Paths that the model has not, before any cut, are left out: not every config of an architecture has all of its params.
    """
    config, found = model.config, {}
    there = tree.flatten(shapes(model.clone(config=config.with_widths())))
    for kind, table in find(config.model_type).CUTS.items():
        axes = [
            (path, axis, getattr(config, entries) if isinstance(entries, str) else entries)
            for path, axis, entries in table["axes"]
        ]
        found[kind] = tuple(
            Units(
                {
                    path.format(i=layer): (axis, entries)
                    for path, axis, entries in axes
                    if path.format(i=layer) in there
                },
                tuple(path.format(i=layer) for path in table["scored"]),
            )
            for layer in range(len(config.widths[kind]))
        )
    return found
