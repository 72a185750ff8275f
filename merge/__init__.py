"""Merge fine-tuned models of one base, in memory: any pytrees of arrays with the same structure.

merged = merge.merge(base, [model_a, model_b], method="rankmean", unit="layer")
"""

from dsee_jax.lazy import package
from merge.in_memory import merge, rankmean_coefficients
from merge.methods import METHODS

__all__ = ["METHODS", "merge", "rankmean_coefficients"]

__getattr__, __dir__ = package(__name__, {})
