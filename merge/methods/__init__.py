"""Ways to merge: a table of `merge.method.Method`, each a pure function of one leaf, computed in float32."""

from collections.abc import Mapping
from typing import Any

from dsee_jax.errors import InputError, did_you_mean
from merge.method import Method
from merge.methods import consensus, data, linear, lines, nearswap, rankmean, sce, spherical, stock

METHODS: dict[str, Method] = (
    rankmean.METHODS
    | linear.METHODS
    | consensus.METHODS
    | spherical.METHODS
    | stock.METHODS
    | sce.METHODS
    | nearswap.METHODS
    | data.METHODS
)
METHODS["lines"] = lines.over(METHODS["task_arithmetic"], "task_arithmetic")


def find(name: str, options: Mapping[str, Any] = {}) -> Method:
    """Return the method called ``name``.

    ``lines`` works over the method that ``options`` name as ``method`` (in recipes) or ``over`` (in Python), whose options it
    has besides its own.

    Raises:
      InputError: no such method, or none that LiNeS could work over.
    """
    if name not in METHODS:
        raise InputError(
            f"no merge method {name!r}{did_you_mean(name, METHODS)}; there are {', '.join(sorted(METHODS))}"
        )
    inner = options.get("over", options.get("method")) if name == "lines" else None
    if inner is None:
        return METHODS[name]
    if inner not in METHODS or inner == "lines":
        others = sorted(METHODS.keys() - {"lines"})
        raise InputError(f"lines over {inner!r}{did_you_mean(str(inner), others)}; expected one of {', '.join(others)}")
    return lines.over(METHODS[inner], inner)
