"""The difference of two checkpoints of one model, per layer: relative change, sparsity and effective rank.

Tensors are read one at a time, so that two large checkpoints never are in memory together.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dsee_jax.ckpt import differences, tensors
from dsee_jax.ckpt.differences import OTHER, Difference
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import layers_by_name


def effective_rank(w: np.ndarray) -> float:
    """Return exp of the entropy of the normalised singular values of ``w`` (in, out), in [1, min(in, out)]; 0 for zeros, NaN
    where an entry is not finite.

    Roy & Vetterli 2007, "The effective rank".
    """
    return entropy_rank(np.linalg.svd(w, compute_uv=False)) if np.isfinite(w).all() else float("nan")


def entropy_rank(values: np.ndarray) -> float:
    """Return the effective rank of a matrix with these singular values: exp of the entropy of their shares; 0 for zeros."""
    if not values.any():
        return 0.0
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def compare(before: Path, after: Path) -> dict[str, Any]:
    """Return ``{"layers": [...], "tensors": [...], "only_before": [...], "only_after": [...]}`` of two model folders.

    Each row has ``change`` (norm of the change over the norm before), ``sparsity`` (fraction of entries that did not
    change, in [0, 1]), ``zeros`` (fraction of zeros after the change, in [0, 1]) and ``effective_rank`` of the change
    (matrices only; the mean over the matrices of a layer).

    Raises:
      InputError: a folder has no weights, no tensor is in both, or the shapes of a tensor differ.
    """
    a, b = tensors.index(before), tensors.index(after)
    matches = differences.matches(a, b)
    # An empty tensor has no entry to compare.
    common = [
        name for name in matches.names if a[name].dtype[0] in "FB" and a[name].dtype != "BOOL" and all(a[name].shape)
    ]
    if not common:
        raise InputError(f"{before} and {after} have no tensor of one name: are they of one architecture?")
    for name, shape, other in matches.reshaped:
        if name in common:
            raise InputError(f"{name!r} is {shape} in {before} and {other} in {after}: not one architecture")
    layers = {name: layer or OTHER for name, layer in layers_by_name(common).items()}
    changes: dict[str, Difference] = {}
    ranks: dict[str, float] = {}  # of matrices
    for name in common:
        w, v = (tensors.read(where).astype(np.float32) for where in (a[name], b[matches.names[name]]))
        changes[name] = differences.difference(w, v)
        if w.ndim == 2 and min(w.shape) > 1:
            ranks[name] = effective_rank(v - w)
    rows = [
        {"layer": layer, **_row(sums, [ranks[name] for name in ranks if layers[name] == layer])}
        for layer, sums in differences.grouped(changes, layers).items()
    ]
    return {
        "before": str(before),
        "after": str(after),
        "layers": rows,
        "tensors": [
            {"name": name, **_row(change, [ranks[name]] if name in ranks else [])} for name, change in changes.items()
        ],
        "only_before": sorted(matches.only_a),
        "only_after": sorted(matches.only_b),
    }


def _row(sums: Difference, ranks: Sequence[float]) -> dict[str, Any]:
    return {
        "size": sums.size,
        # The relative change from a tensor of zeros is infinite, which JSON cannot hold.
        "change": sums.relative if sums.a else None,
        "sparsity": sums.share(sums.equal),
        "zeros": sums.share(sums.zeros),
        "effective_rank": float(np.mean(ranks)) if ranks else None,
    }


def table(comparison: dict[str, Any], *, every_tensor: bool = False) -> Table:
    """Return the result of `compare` as a table with one row per layer, or one row per tensor."""
    result = Table(title=f"{comparison['before']} -> {comparison['after']}", title_justify="left")
    kind = "tensors" if every_tensor else "layers"
    result.add_column(kind[:-1])
    for name in ("entries", "relative change", "entries unchanged", "zeros after", "effective rank of the change"):
        result.add_column(name, justify="right")
    for row in comparison[kind]:
        rank = row["effective_rank"]
        result.add_row(
            str(row.get("layer", row.get("name"))),
            f"{row['size']:,}",
            "-" if row["change"] is None else f"{row['change']:.2%}",
            f"{row['sparsity']:.1%}",
            f"{row['zeros']:.1%}",
            "-" if rank is None else f"{rank:.1f}",
        )
    return result
