"""Architectures by Hugging Face's ``model_type``, and generic functions of their models."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.models import bert, deberta, gpt2, llama, mpnet, roberta, xlm_roberta
from dsee_jax.models.architecture import HIDDEN, Architecture, Model, UnitTemplate
from dsee_jax.typing import Cuts, Units

_FAMILIES = (bert, deberta, gpt2, mpnet, roberta, xlm_roberta, llama)

MODELS: dict[str, Architecture] = {
    model_type: family.ARCHITECTURE for family in _FAMILIES for model_type in family.ARCHITECTURE.model_types
}
"""``model_type`` -> its architecture; several may share one."""

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""The arrays of a batch that the model takes; ``labels`` and ``weights`` are for the loss."""


def find(model_type: str) -> Architecture:
    """Return the architecture of a ``model_type``; raises `InputError` with the supported ones."""
    if not isinstance(model_type, str) or model_type not in MODELS:
        raise InputError(f"'model_type' {model_type!r} is not supported; supported: {', '.join(MODELS)}")
    return MODELS[model_type]


def of_config(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a parsed ``config.json``; raises `InputError` as `find` does, or if the file names none."""
    if config.get("model_type") is not None:
        return find(config["model_type"])
    classes = config.get("architectures")
    names = {model_type: name for each in MODELS.values() for model_type, name in each.model_types.items()}
    # The longest name: the class of one model type may begin with the name of another.
    near = [
        (len(name), model_type, each)
        for each in (classes if isinstance(classes, list) else ())
        for model_type, name in names.items()
        if isinstance(each, str) and each.startswith(name)
    ]
    if near:
        _, model_type, each = max(near)
        fix = f'the file is of the class {each}: add "model_type": "{model_type}"'
    else:
        fix = f"add the kind of the model, one of {', '.join(MODELS)}"
    raise InputError(f"'model_type' is missing; {fix}")


def class_name(model: Model) -> str:
    """Return the name of Hugging Face's class of a model, which depends on its task."""
    architecture = find(model.config.model_type)
    return architecture.model_types[model.config.model_type] + architecture.tasks[model.task]


def shapes(model: Model) -> dict[str, Any]:
    """Return the params of a model as shapes and dtypes, in a new tree; nothing is computed, and JAX traces a model once."""
    return _init.eval_shape(model)["params"]


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model) -> dict[str, Any]:
    return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def label_axes(model: Model) -> dict[str, int]:
    """Return the axis of the labels in every param that gives them; ``num_labels`` decides its size. Empty: no labels."""
    wider = model.clone(config=dataclasses.replace(model.config, num_labels=model.config.num_labels + 1))
    own, other = (tree.flatten(shapes(each)) for each in (model, wider))
    return {
        path: next(axis for axis, size in enumerate(leaf.shape) if size != other[path].shape[axis])
        for path, leaf in own.items()
        if leaf.shape != other[path].shape
    }


def logical_axes(model: Model) -> dict[str, tuple[str | None, ...]]:
    """Return the logical names of the axes of every param, by path; stacked params have one more axis before them."""
    table = find(model.config.model_type).axes
    return {
        path: next(names for pattern, names in table if re.fullmatch(pattern, path))
        for path in tree.flatten(shapes(model))
    }


@functools.lru_cache(maxsize=16)
def hidden_axes(model: Model) -> dict[str, tuple[int, ...]]:
    """Return the axes along the hidden dimension of the residual stream of every param that has some, by path."""
    axes = {
        path: tuple(axis for axis, name in enumerate(names) if name == HIDDEN)
        for path, names in logical_axes(model).items()
    }
    return {path: own for path, own in axes.items() if own}


def cuts(model: Model) -> Cuts:
    """Return the units of a model of this library that can be pruned: `Architecture.cuts`, written out for every layer.

    Paths that the model lacks with all units are left out: not every config of an architecture has all of its params.
    For the units of another model, write its cuts, a ``dict[str, Sequence[Units]]`` (`dsee_jax.typing.Cuts`).

    Raises:
      InputError: the model is not of this library.
    """
    if not any(base.__module__.startswith(f"{__name__}.") for base in type(model).__mro__):
        raise InputError(
            f"the model is of the type {type(model).__name__}; expected a model of this library, as from load_pretrained: "
            "of another model, write the cuts (dsee_jax.typing.Cuts) for prune.structured and prune.earlybert"
        )
    return _cuts(model)


@functools.lru_cache(maxsize=16)
def _cuts(model: Model) -> Cuts:
    config = model.config
    paths = tree.flatten(shapes(model.clone(config=config.with_widths()))).keys()

    def units(template: UnitTemplate, layer: int) -> Units:
        axes = ((path.format(i=layer), axis, entries) for path, axis, entries in template.axes)
        return Units(
            {
                path: (axis, getattr(config, entries) if isinstance(entries, str) else entries)
                for path, axis, entries in axes
                if path in paths
            },
            tuple(path.format(i=layer) for path in template.scored),
        )

    return {
        kind: tuple(units(template, layer) for layer in range(len(config.widths[kind])))
        for kind, template in find(config.model_type).cuts.items()
    }
