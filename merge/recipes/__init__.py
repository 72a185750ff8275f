"""Recipes: strict YAML, settings of tensors, and mergekit's grammar."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
