"""The merge methods: a table of `merge.method.Method`, each a pure function of one leaf, computed in float32."""

from collections.abc import Mapping
from typing import Any

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.lazy import package
from merge.method import Method
from merge.methods import (
    arcee_fusion,
    breadcrumbs,
    dare,
    della,
    fisher_regmean,
    linear,
    lines,
    model_stock,
    nearswap,
    ram,
    rankmean,
    sce,
    spherical,
    ties,
)

_SPARSE = ties.METHODS | dare.METHODS | della.METHODS | breadcrumbs.METHODS
_ORDER = ("ties", "dare_ties", "della", "breadcrumbs_ties", "dare_linear", "della_linear", "breadcrumbs")

METHODS: dict[str, Method] = (
    rankmean.METHODS
    | linear.METHODS
    | {name: _SPARSE[name] for name in _ORDER}
    | spherical.METHODS
    | model_stock.METHODS
    | sce.METHODS
    | nearswap.METHODS
    | arcee_fusion.METHODS
    | ram.METHODS
    | fisher_regmean.METHODS
)
METHODS["lines"] = lines.over(METHODS["task_arithmetic"], "task_arithmetic")
"""Every method by its name in recipes, with its options and their ranges, defaults and meaning (`merge.method.Method`)."""


def find(name: str, options: Mapping[str, Any] = {}) -> Method:
    """Return the method called ``name``.

    ``lines`` works over another method, named by the option ``method`` (in recipes) or ``over`` (in Python), and takes the
    options of that method too.

    Raises:
      InputError: no such method, or a method that LiNeS cannot work over.
    """
    if name not in METHODS:
        raise InputError(
            f"no merge method {name!r}{did_you_mean(name, METHODS)}; there are {', '.join(sorted(METHODS))}"
        )
    inner = options.get("over", options.get("method")) if name == "lines" else None
    if inner is None:
        return METHODS[name]
    if not isinstance(inner, str) or inner not in METHODS or inner == "lines":
        others = sorted(METHODS.keys() - {"lines"})
        raise InputError(f"lines over {inner!r}{did_you_mean(str(inner), others)}; expected one of {', '.join(others)}")
    return lines.over(METHODS[inner], inner)


__getattr__, __dir__ = package(__name__, {})
