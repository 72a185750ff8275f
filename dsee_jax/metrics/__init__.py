"""Metrics: scores of classes and of texts, and multiply-adds."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
