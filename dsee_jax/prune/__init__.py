"""Pruning: masks of weights, heads and neurons, and the smaller model without the pruned heads and neurons."""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from dsee_jax.prune import calibration, earlybert
    from dsee_jax.prune.compaction import compact, expand
    from dsee_jax.prune.units import structured
    from dsee_jax.prune.weights import cubic, nm, unstructured

__all__ = ["calibration", "compact", "cubic", "earlybert", "expand", "nm", "structured", "unstructured"]

_PUBLIC = {
    "compact": "compaction",
    "expand": "compaction",
    "structured": "units",
    "cubic": "weights",
    "nm": "weights",
    "unstructured": "weights",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and reports other names
    __getattr__, __dir__ = package(__name__, _PUBLIC)
