"""LiNeS: scale the merged change of another method by the depth of the layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dsee_jax.typing import Array
from merge import topk, units
from merge.leaf import Leaf, Tile, fold_all, numbers
from merge.method import Method, Option
from merge.topk import Selection


class Scaled(NamedTuple):
    """A `Leaf` that multiplies the merged tensor's change from the base by ``factor`` ()."""

    leaf: Leaf
    factor: Array

    @property
    def name(self) -> str:  # noqa: D102
        return self.leaf.name

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.leaf.shape

    @property
    def count(self) -> int:  # noqa: D102 # pyright: ignore[reportIncompatibleMethodOverride]
        return self.leaf.count

    @property
    def has_base(self) -> bool:  # noqa: D102
        return self.leaf.has_base

    def fold(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:  # noqa: D102
        return self.leaf.fold(function, *args, **static)

    def map(self, function: Callable[..., Any], *args: Any, **static: Any) -> Any:  # noqa: D102
        return self.leaf.map(_scaled, self.factor, *args, inner=function, **static)

    def fold_all(self, leaves: Sequence[Any], *args: Any, **static: Any) -> list[Any]:  # noqa: D102
        return fold_all([scaled.leaf for scaled in leaves], *args, **static)

    def select(self, leaves: Sequence[Any], *args: Any, **static: Any) -> list[Selection]:  # noqa: D102
        return topk.largest([scaled.leaf for scaled in leaves], *args, **static)


def over(inner: Method, name: str) -> Method:
    """Return LiNeS (Wang et al. 2024, arXiv 2410.17146) over the method ``inner``, called ``name``.

    The merged change is multiplied by ``alpha + beta * l / (L - 1)`` in layer l of L, and by ``alpha`` outside the layers.
    The options are those of ``inner``, ``method``, ``alpha`` and ``beta``.
    """

    def merge(leaf: Leaf, *, factor: Any, over: str = name, alpha: Any = None, beta: Any = None, **options: Any) -> Any:
        return inner.merge(Scaled(leaf, numbers(factor)), **options)

    def prepare(leaves: Sequence[Leaf], options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        depth = units.depths([leaf.name for leaf in leaves])
        factors = [
            keywords["alpha"] + keywords["beta"] * (depth[leaf.name] or 0)
            for leaf, keywords in zip(leaves, options, strict=True)
        ]
        rest = [{key: value for key, value in keywords.items() if key not in OWN} for keywords in options]
        extra = inner.prepare(leaves, rest) if inner.prepare else [{} for _ in leaves]
        return [{"factor": factor, **more} for factor, more in zip(factors, extra, strict=True)]

    def check(where: str, *, over: str = name, alpha: Any = None, beta: Any = None, **options: Any) -> None:
        inner.check(where, **options)

    return Method(
        merge,
        inner.each,
        {**inner.shared, **OPTIONS, "method": OPTIONS["method"]._replace(default=name)},
        f"LiNeS over {name}: {inner.help}; the change is scaled by layer depth (arXiv 2410.17146)",
        models=inner.models,
        by_rows=inner.by_rows,
        exact=inner.exact,
        statistics=inner.statistics,
        prepare=prepare,
        check=check,
    )


def _scaled(tile: Tile, factor: jax.Array, *args: Any, inner: Callable[..., jax.Array], **static: Any) -> jax.Array:
    return tile.origin + factor * (inner(tile, *args, **static) - tile.origin)


OWN = ("over", "alpha", "beta")
OPTIONS = {
    "method": Option(str, "task_arithmetic", "method that merges the changes"),
    "alpha": Option(float, None, "factor of the change in the first layer and outside the layers"),
    "beta": Option(float, None, "increase of the factor from the first layer to the last"),
}
