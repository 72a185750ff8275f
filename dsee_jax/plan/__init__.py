"""Ahead-of-time analysis of compiled steps: memory, FLOPs, collectives and roofline."""

from dsee_jax.lazy import package

__getattr__, __dir__ = package(__name__, {})
