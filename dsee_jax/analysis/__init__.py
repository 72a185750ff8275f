"""Comparisons of checkpoints, statistics over training data, and pictures of a run."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
