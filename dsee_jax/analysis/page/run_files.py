"""The figures of a run for its page: its log, its results, its model and its updates."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax import tree
from dsee_jax.analysis.compare import entropy_rank
from dsee_jax.analysis.pictures import Zeros, curves, sparsity
from dsee_jax.ckpt import adapter, kept_units
from dsee_jax.ckpt.folders import ADAPTER, LOG, METRICS, MODEL, read_json
from dsee_jax.runtime import files
from dsee_jax.typing import Masks


class Update(NamedTuple):
    """The update of one kernel."""

    rank: float  # the effective rank of A @ B + S
    shape: tuple[int, int]  # of the kernel; without A and B the smallest that holds the support
    support: np.ndarray  # (nonzeros, 2): row and column of each entry of S; empty without a sparse part


class RunFigures(NamedTuple):
    """A finished run, as its page shows it."""

    name: str
    results: dict[str, Any]  # metrics.json
    placed: list[tuple[int, Mapping[str, Any]]]  # the records of the log, by the step from the start of the run
    begin: dict[str, int]  # the first step of each stage
    zeros: sparsity.Zeros | None  # None without model/
    kept: Masks  # heads and neurons, True = kept; empty if none was pruned
    updates: dict[str, dict[str, Update]]  # by kind of kernel, such as attention/query, and layer


def read(run: Path, name: str, *, zeros: Zeros = sparsity.zeros) -> RunFigures:
    """Return the figures of a finished run.

    Raises:
      InputError: a file of the run is missing or damaged.
      LookupError, TypeError, ValueError: a record of the log lacks its stage, its step or its numbers.
    """
    model, saved = run / MODEL, adapter.load(run / ADAPTER) if (run / ADAPTER).is_dir() else None
    placed, begin = curves.timeline(files.read(run / LOG))
    return RunFigures(
        name=name,
        results=read_json(run / METRICS),
        placed=placed,
        begin=begin,
        zeros=zeros(model) if model.is_dir() else None,
        kept=kept_units.read(model),
        updates=updates(saved) if saved else {},
    )


def updates(saved: adapter.Saved) -> dict[str, dict[str, Update]]:
    """Return the updates of an adapter by kind of kernel and layer; a kernel outside of the layers has the layer ``-``."""
    leaves: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in tree.flatten(saved.deltas).items():
        kernel, _, part = path.rpartition("/")
        leaves.setdefault(kernel, {})[part] = np.asarray(leaf, np.float64)
    supports = tree.flatten(saved.supports)
    ratio = 1.0 if saved.config["scale_sparse"] else 1.0 / saved.config["scale"]
    result: dict[str, dict[str, Update]] = {}
    for kernel, parts in leaves.items():
        place = re.fullmatch(r"(?:.*/)?\D+_(\d+)/(.+?)(?:/kernel)?", kernel)
        kind, layer = (place[2], place[1]) if place else (kernel.removesuffix("/kernel"), "-")
        support = np.asarray(supports.get(kernel, np.zeros((0, 2), int)))
        low = (parts["a"], parts["b"]) if "a" in parts else None
        shape = (len(low[0]), low[1].shape[1]) if low else (int(support[:, 0].max()) + 1, int(support[:, 1].max()) + 1)
        values = singular_values(low, ratio * parts.get("values", np.zeros(0)), support)
        result.setdefault(kind, {})[layer] = Update(entropy_rank(values), shape, support)
    return result


def singular_values(low: tuple[np.ndarray, np.ndarray] | None, values: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Return the singular values above 0 of A @ B + S from its parts, without a matrix of the size of the kernel.

    Args:
      low: A (in, rank) and B (rank, out), or None for 0.
      values: (nonzeros,): the entries of S.
      support: (nonzeros, 2): their rows and columns.
    """
    # S has few rows R with entries: S = E @ S[R] for columns E of the identity, so the sum is [A, E] @ [B; S[R]].
    rows, of_entry = np.unique(support[:, 0], return_inverse=True)
    inputs = max(int(rows.max(initial=-1)) + 1, len(low[0]) if low else 0)
    outputs = max(int(support[:, 1].max(initial=-1)) + 1, low[1].shape[1] if low else 0)
    picked, sparse = np.zeros((inputs, len(rows))), np.zeros((len(rows), outputs))
    picked[rows, np.arange(len(rows))] = 1.0
    np.add.at(sparse, (of_entry, support[:, 1]), values)
    left = np.concatenate([low[0], picked], 1) if low else picked
    right = np.concatenate([low[1], sparse], 0) if low else sparse
    small = np.asarray(np.linalg.qr(left, mode="r")) @ np.asarray(np.linalg.qr(right.T, mode="r")).T
    return np.linalg.svd(small, compute_uv=False)
