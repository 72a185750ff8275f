"""Merge fine-tuned models of one base, in memory: any pytrees of arrays with the same structure.

merged = merge.merge(base, [model_a, model_b], method="rankmean", unit="layer")
"""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from merge.in_memory import merge, rankmean_coefficients
    from merge.methods import METHODS

__all__ = ["METHODS", "merge", "rankmean_coefficients"]

_PUBLIC = {"merge": "in_memory", "rankmean_coefficients": "in_memory", "METHODS": "methods"}
"""The submodule that defines each public name."""

__getattr__, __dir__ = package(__name__, _PUBLIC)
