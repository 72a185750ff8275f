"""RankMean (ACL 2024 Findings): coefficients from the ranks of each group's change within its model, without data.

    rank_m(u) = rank of sum |t_m - t0| over the tensors of group u, among the groups of model m, 1 = changed least
    c_m(u)    = rank_m(u) / sum_k rank_k(u)               ascending, the paper's
    c_m(u)   ~= 1 / (U + 1 - rank_m(u))                    reversed, normalised over the models

The authors' code breaks ties by the order of the groups; here tied groups share their mean rank unless ``ties`` is ``order``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.typing import Array
from merge import units
from merge.leaf import Leaf, Tile, fold_all, numbers, program
from merge.method import Method, Option
from merge.methods.linear import weighted


def rankmean(leaf: Leaf, *, coefficients: Array, **options: Any) -> Any:
    """Return ``sum_m c_m t_m``; ``coefficients`` (models,) are those of the tensor's group, from `prepare`."""
    return leaf.map(weighted, numbers(coefficients))


def prepare(leaves: Sequence[Leaf], options: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return each leaf's ``coefficients`` (models,): those of its group, or the plain mean outside every group.

    A leaf in a group also gets ``change`` (models,): the sum of |change| over the sum of the base's |values|. The option
    ``coefficients``, ``{group: (models,)}``, replaces the coefficients from the ranks.
    """
    shared = dict(options[0])
    if any(dict(keywords) != shared for keywords in options):
        raise InputError("rankmean's options hold for the whole model; give each option one value, without a filter")
    where = units.of([leaf.name for leaf in leaves], shared.get("unit", "layer"))
    shares, changes = shared.pop("coefficients", None), {}
    if shares is None:
        shares, changes = coefficients_and_changes(leaves, **shared)
    for group in where.values():
        if group is not None and group not in shares:
            raise InputError(
                f"no coefficients of unit {group!r}{did_you_mean(group, shares)}; give those of every unit"
            )
    count = leaves[0].count
    plain = {"coefficients": np.full(count, 1 / count, np.float32)}

    def extra(group: str | None) -> dict[str, Any]:
        if group is None:
            return plain
        change = {"change": changes[group]} if changes else {}
        return {"coefficients": shares[group], **change}

    return [extra(where[leaf.name]) for leaf in leaves]


def coefficients_and_changes(
    leaves: Sequence[Leaf],
    *,
    unit: str = "layer",
    order: Literal["ascending", "reversed"] = "ascending",
    ties: Literal["mean", "order"] = "mean",
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return ``{group: coefficients (models,)}`` and ``{group: relative change (models,)}``, groups in natural order.

    See `ranks` for the options.
    """
    where = units.of([leaf.name for leaf in leaves], unit)
    inside = [leaf for leaf in leaves if where[leaf.name] is not None]
    sums: dict[str, Any] = {}
    for leaf, sizes in zip(inside, fold_all(inside, _sizes), strict=True):
        name = where[leaf.name] or ""
        sums[name] = jax.tree.map(lambda x, y: x + y, sums[name], sizes) if name in sums else sizes
    names = sorted(sums, key=units.natural)
    # Streamed sums are rounded to float32 too: float64 would break ties that float32 keeps.
    scores, base = (_stacked([sums[name][part] for name in names]) for part in (0, 1))
    # For the few numbers of a streamed merge, NumPy is faster than a compiled program.
    compute = (
        _coefficients_and_changes
        if isinstance(scores, np.ndarray)
        else program(_coefficients_and_changes, "order", "ties")
    )
    shares, changes = compute(scores, base, order=order, ties=ties)
    return dict(zip(names, shares, strict=True)), dict(zip(names, changes, strict=True))


def _stacked(parts: Sequence[Array]) -> Array:
    xp = np if isinstance(parts[0], np.ndarray) else jnp
    return xp.stack([xp.asarray(part, xp.float32) for part in parts])


def _coefficients_and_changes(scores: Array, base: Array, *, order: Any, ties: Any) -> tuple[Array, Array]:
    """Return the coefficients and the relative changes, (groups, models) like ``scores``; ``base`` is (groups,)."""
    xp, base = np if isinstance(scores, np.ndarray) else jnp, base[:, None]
    # A base of zeros has no relative change.
    changes = xp.where(base > 0, scores / xp.where(base > 0, base, 1), xp.nan)
    return coefficients(scores.T, order=order, ties=ties).T, changes


def ranks(scores: Array, *, descending: bool = False, ties: Literal["mean", "order"] = "mean") -> Array:
    """Return the ranks (groups,) float32, from 1, of ``scores`` (groups,); ``descending`` gives the largest rank 1.

    The rank of NaN is NaN.
    """
    xp = np if isinstance(scores, np.ndarray) else jnp
    across, down = scores[None, :], scores[:, None]
    before = (across > down) if descending else (across < down)
    equal = across == down
    if ties == "order":
        position = np.arange(scores.shape[0])
        result = xp.sum(before | (equal & (position[None, :] <= position[:, None])), axis=1)
    else:
        lower, level = (xp.sum(flags, axis=1).astype(xp.float32) for flags in (before, equal))
        result = lower + (level + 1) / 2
    return xp.where(scores == scores, result, xp.nan).astype(xp.float32)


def coefficients(
    scores: Array,
    *,
    order: Literal["ascending", "reversed"] = "ascending",
    ties: Literal["mean", "order"] = "mean",
) -> Array:
    """Return the coefficients (models, groups), each column summing to 1, of the changes ``scores`` (models, groups)."""
    xp = np if isinstance(scores, np.ndarray) else jnp
    ranked = xp.stack([ranks(row, descending=order == "reversed", ties=ties) for row in scores])
    # Streamed and in-memory merges divide in one program, and therefore get the same bits.
    return xp.asarray(program(_shares, "order")(ranked, order=order))


def _shares(ranks: Array, *, order: str) -> Array:
    share = 1 / ranks if order == "reversed" else ranks
    return share / jnp.sum(share, axis=0, keepdims=True)


def _sizes(tile: Tile) -> tuple[jax.Array, jax.Array]:
    return jnp.stack([jnp.sum(jnp.abs(delta)) for delta in tile.deltas]), jnp.sum(jnp.abs(tile.origin))


METHODS = {
    "rankmean": Method(
        rankmean,
        {},
        {
            "unit": Option(str, "layer", "layer, tensor, or a regular expression with a group named unit"),
            "order": Option(
                str,
                "ascending",
                "ascending: weights are ranks from the smallest change up; reversed: 1 over ranks from the largest down",
                choices=("ascending", "reversed"),
            ),
            "ties": Option(
                str,
                "mean",
                "rank of equal changes: their mean rank, or by the order of the units",
                choices=("mean", "order"),
            ),
        },
        "mean of the models, weighted by the rank of each unit's change within its model (RankMean, ACL 2024 Findings)",
        prepare=prepare,
    )
}
