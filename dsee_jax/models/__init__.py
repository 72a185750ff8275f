"""Architectures by Hugging Face's ``model_type``.

A module of this table has ``Config`` (with ``from_hf``), ``Model(config, task)``, and the tables ARCHITECTURES, HEAD, PREFIX,
HF_NAMES, OLD_NAMES, IGNORED_NAMES, AXES and CUTS: all that generic code may know of an architecture.
"""

from types import ModuleType

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.models import bert

MODELS: dict[str, ModuleType] = {"bert": bert}


def find(model_type: str) -> ModuleType:
    """Return the module of a ``model_type``; raises `InputError` with those there are."""
    if model_type not in MODELS:
        near = did_you_mean(str(model_type), MODELS)
        raise InputError(f"'model_type' {model_type!r} is not supported{near}; supported: {', '.join(MODELS)}")
    return MODELS[model_type]
