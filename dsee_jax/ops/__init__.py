"""Functions of single arrays with gradient rules of their own."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
