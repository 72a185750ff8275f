"""Functions of single arrays with custom gradient rules."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
