"""Compiled steps, read ahead of time: memory, collectives, roofline."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
