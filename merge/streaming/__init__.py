"""Merging from files to files: tiles, exact thresholds, shards, and one or two passes."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
