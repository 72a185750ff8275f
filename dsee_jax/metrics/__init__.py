"""Scores of classes and of texts, and FLOPs."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
