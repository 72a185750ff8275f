"""The plan of a merge: inputs, method and options for every tensor of the result, from a recipe and headers."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
