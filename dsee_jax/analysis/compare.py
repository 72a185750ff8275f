"""How two checkpoints of one model differ: how far each layer moved, how sparsely, and in how many directions.

Read tensor by tensor from safetensors, so that two large checkpoints never lie in memory together.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError

LAYER = r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\."
"""A numbered transformer layer in Hugging Face's names; tensors outside one stand under ``other``."""


def effective_rank(w: np.ndarray) -> float:
    """Return exp of the entropy of the normalised singular values of ``w`` (in, out), in [1, min(in, out)]; 0 for zeros.

    Roy & Vetterli 2007, "The effective rank".
    """
    values = np.linalg.svd(w, compute_uv=False)
    if not values.any():
        return 0.0
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def compare(before: Path, after: Path) -> dict[str, Any]:
    """Return ``{"layers": [...], "tensors": [...], "only_before": [...], "only_after": [...]}`` of two model folders.

    Each row has ``change`` (norm of the change over the norm before), ``sparsity`` (fraction of entries that did not
    change, in [0, 1]), ``zeros`` (fraction of entries that are zero after, in [0, 1]) and ``effective_rank`` of the change
    (matrices; the mean over the matrices of a layer).

    Raises:
      InputError: a folder without weights, no common tensor, or shapes that differ.
    """
    a, b = tensors.index(before), tensors.index(after)
    pairs = tensors.paired(a, b)
    b = {name: b[theirs] for name, theirs in pairs.items()} | {n: b[n] for n in b.keys() - set(pairs.values())}
    common = [name for name in pairs if a[name].dtype[0] in "FB" and a[name].dtype != "BOOL"]
    if not common:
        raise InputError(f"{before} and {after} have no tensor of one name: are they of one architecture?")
    rows = []
    for name in common:
        if a[name].shape != b[name].shape:
            raise InputError(
                f"{name!r} is {a[name].shape} in {before} and {b[name].shape} in {after}: not one architecture"
            )
        w, v = (tensors.read(where[name]).astype(np.float32) for where in (a, b))
        change = v - w
        rows.append(
            {
                "name": name,
                "layer": found[1] if (found := re.search(LAYER, name)) else "other",
                "size": w.size,
                "squared": float(np.sum(np.square(w, dtype=np.float64))),
                "squared_change": float(np.sum(np.square(change, dtype=np.float64))),
                "same": int(np.count_nonzero(change == 0)),
                "zero": int(np.count_nonzero(v == 0)),
                "effective_rank": effective_rank(change) if w.ndim == 2 and min(w.shape) > 1 else None,
            }
        )
    order = sorted(
        {row["layer"] for row in rows}, key=lambda layer: (layer == "other", int(layer) if layer.isdigit() else 0)
    )
    layers = [{"layer": layer, **_summary([row for row in rows if row["layer"] == layer])} for layer in order]
    return {
        "before": str(before),
        "after": str(after),
        "layers": layers,
        "tensors": [{"name": row["name"], **_summary([row])} for row in rows],
        "only_before": sorted(a.keys() - b.keys()),
        "only_after": sorted(b.keys() - a.keys()),
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    size, squared = sum(row["size"] for row in rows), sum(row["squared"] for row in rows)
    moved = sum(row["squared_change"] for row in rows)
    ranks = [row["effective_rank"] for row in rows if row["effective_rank"] is not None]
    return {
        "size": size,
        # A tensor that was zero before has no relative change; JSON has no infinity.
        "change": float(np.sqrt(moved / squared)) if squared else None,
        "sparsity": sum(row["same"] for row in rows) / size,
        "zeros": sum(row["zero"] for row in rows) / size,
        "effective_rank": float(np.mean(ranks)) if ranks else None,
    }


def table(found: dict[str, Any], *, every_tensor: bool = False) -> Table:
    """Return `compare`'s result for a person: a row a layer, or a row a tensor."""
    shown = Table(title=f"{found['before']} -> {found['after']}", title_justify="left")
    kind = "tensors" if every_tensor else "layers"
    shown.add_column(kind[:-1])
    for name in ("entries", "relative change", "entries unchanged", "zeros after", "effective rank of the change"):
        shown.add_column(name, justify="right")
    for row in found[kind]:
        rank = row["effective_rank"]
        shown.add_row(
            str(row.get("layer", row.get("name"))),
            f"{row['size']:,}",
            "-" if row["change"] is None else f"{row['change']:.2%}",
            f"{row['sparsity']:.1%}",
            f"{row['zeros']:.1%}",
            "-" if rank is None else f"{rank:.1f}",
        )
    return shown
