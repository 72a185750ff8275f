"""Pruning: masks of weights, kept units, and the smaller model without the pruned units."""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from dsee_jax.prune import budget, calibration, costs, earlybert, fisher, gradients, latency, sensitivity, width
    from dsee_jax.prune.compaction import compact, expand
    from dsee_jax.prune.masked_model import masked
    from dsee_jax.prune.reconstruction import sparsegpt
    from dsee_jax.prune.selection import select
    from dsee_jax.prune.sequence import layerwise
    from dsee_jax.prune.units import structured
    from dsee_jax.prune.weights import cubic, nm, unstructured

__all__ = [
    "budget",
    "calibration",
    "compact",
    "costs",
    "cubic",
    "earlybert",
    "expand",
    "fisher",
    "gradients",
    "latency",
    "layerwise",
    "masked",
    "nm",
    "select",
    "sensitivity",
    "sparsegpt",
    "structured",
    "unstructured",
    "width",
]

_PUBLIC = {
    "compact": "compaction",
    "expand": "compaction",
    "masked": "masked_model",
    "select": "selection",
    "sparsegpt": "reconstruction",
    "layerwise": "sequence",
    "structured": "units",
    "cubic": "weights",
    "nm": "weights",
    "unstructured": "weights",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and reports other names
    __getattr__, __dir__ = package(__name__, _PUBLIC)
