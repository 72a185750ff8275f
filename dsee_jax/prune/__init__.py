"""Pruning: masks of weights, kept units, and the smaller model without the pruned units."""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from dsee_jax.prune import calibration, earlybert
    from dsee_jax.prune.compaction import compact, expand
    from dsee_jax.prune.masked_model import masked
    from dsee_jax.prune.selection import select
    from dsee_jax.prune.units import structured
    from dsee_jax.prune.weights import cubic, nm, unstructured

__all__ = [
    "calibration",
    "compact",
    "cubic",
    "earlybert",
    "expand",
    "masked",
    "nm",
    "select",
    "structured",
    "unstructured",
]

_PUBLIC = {
    "compact": "compaction",
    "expand": "compaction",
    "masked": "masked_model",
    "select": "selection",
    "structured": "units",
    "cubic": "weights",
    "nm": "weights",
    "unstructured": "weights",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and reports other names
    __getattr__, __dir__ = package(__name__, _PUBLIC)
