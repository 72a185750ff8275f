"""Merge fine-tuned models of one base, in memory: any pytrees of arrays with the same structure.

::

    merged = merge.rankmean(base, [model_a, model_b], unit="layer")
"""

from typing import TYPE_CHECKING

from dsee_jax.lazy import package

if TYPE_CHECKING:
    from merge.in_memory import merge, rankmean_coefficients
    from merge.methods import METHODS
    from merge.signatures import (
        arcee_fusion,
        breadcrumbs,
        breadcrumbs_ties,
        dare_linear,
        dare_ties,
        della,
        della_linear,
        fisher,
        karcher,
        linear,
        lines,
        model_stock,
        multislerp,
        nearswap,
        nuslerp,
        passthrough,
        ram,
        ramplus_tl,
        rankmean,
        regmean,
        sce,
        slerp,
        task_arithmetic,
        ties,
    )

__all__ = [
    "METHODS",
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "fisher",
    "karcher",
    "linear",
    "lines",
    "merge",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "rankmean",
    "rankmean_coefficients",
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]

_PUBLIC = dict.fromkeys(__all__, "signatures") | {
    "merge": "in_memory",
    "rankmean_coefficients": "in_memory",
    "METHODS": "methods",
}
"""The submodule that defines each public name."""

if not TYPE_CHECKING:  # A type checker then knows the names above only, and reports a misspelt one.
    __getattr__, __dir__ = package(__name__, _PUBLIC)
