"""The model of a finished run for other tools."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
