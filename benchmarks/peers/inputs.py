"""The inputs of a case, the same for every side: NumPy arrays from the sizes alone, and texts from GLUE's files."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

CHECKED = 4
"""The rows of the batch by which sides are compared."""

SPIKES = 64
"""The planted entries of `planted`."""


def ids(case: Mapping[str, Any], vocabulary: int) -> np.ndarray:
    """Return token ids, int64 (batch, length), from 5 on: no special tokens."""
    return np.random.default_rng(0).integers(5, vocabulary, (case["batch"], case["length"]), np.int64)


def labels(case: Mapping[str, Any]) -> np.ndarray:
    """Return classes, int64 (batch,), 0 or 1."""
    return np.random.default_rng(1).integers(0, 2, case["batch"], np.int64)


def factor(name: str, inner: int, outer: int) -> np.ndarray:
    """Return a factor of an update that is the same on every side, float32: ``a`` (in, rank) or ``b`` (rank, out)."""
    rows, columns = np.arange(inner, dtype=np.float32)[:, None], np.arange(outer, dtype=np.float32)[None]
    return 0.1 * np.sin(rows + 2 * columns) if name == "a" else 0.1 * np.cos(rows + 3 * columns)


def chosen(logits: np.ndarray, tokens: np.ndarray, beams: int) -> dict[str, Any]:
    """Return the numbers by which generated tokens are compared (`rounds.check`).

    Greedy: the tokens, and the margins at which they were chosen. Beams: the mean log probability of the tokens of each row,
    which a near tie between two beams leaves nearly as it is.

    Args:
      logits: float (rows, steps, vocabulary), before each token.
      tokens: int (rows, steps), the new tokens.
      beams: 1 for greedy.
    """
    logits = logits.astype(np.float64)
    if beams == 1:
        second, highest = np.moveaxis(np.partition(logits, -2)[..., -2:], -1, 0)
        return {"tokens": tokens.tolist(), "margins": (highest - second).tolist()}
    logits -= logits.max(-1, keepdims=True)
    picked = np.take_along_axis(logits, tokens[..., None].astype(np.int64), -1)[..., 0]
    return {"log_probabilities": (picked - np.log(np.exp(logits).sum(-1))).mean(-1).tolist()}


def texts(folder: str | Path, split: str) -> tuple[list[str], list[str] | None, list[int]]:
    """Return the first sentences, the second sentences or None, and the classes of RTE or SST-2 in GLUE's layout."""
    with (Path(folder) / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if "sentence" in rows[0]:
        return [row["sentence"] for row in rows], None, [int(row["label"]) for row in rows]
    classes = {"entailment": 0, "not_entailment": 1}
    pairs = [row["sentence2"] for row in rows]
    return [row["sentence1"] for row in rows], pairs, [classes[row["label"]] for row in rows]


def subset(source: Path, folder: Path, examples: int) -> None:
    """Write train.tsv with the first ``examples`` rows, and dev.tsv; a complete folder stays."""
    if (folder / "train.tsv").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = (source / "train.tsv").read_text(encoding="utf-8").split("\n")
    (folder / "dev.tsv").write_bytes((source / "dev.tsv").read_bytes())
    # Last: train.tsv marks the folder as complete.
    (folder / "train.tsv").write_text("\n".join(lines[: 1 + examples]) + "\n", encoding="utf-8")


def invented(folder: Path, examples: int) -> None:
    """Write a small data set in the layout of SST-2, to try the path: the class is whether the text has the word good."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    draw, words = np.random.default_rng(0), ["good", "film", "a", "plot", "with", "it", "actors", "and"]
    for split, count in (("dev", examples // 2), ("train", examples)):
        rows = [[words[n] for n in draw.integers(0, len(words), draw.integers(2, 12))] for _ in range(count)]
        lines = [f"{' '.join(row)}\t{int('good' in row)}" for row in rows]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def planted(seed: int, width: int = 768) -> tuple[np.ndarray, set[int]]:
    """Return a float32 matrix and the flat indices of its 64 spikes.

    The matrix is the sum of a matrix of rank 16 with entries about 1, noise of 0.01, and the spikes of +-0.5 to 0.75.
    """
    draw = np.random.default_rng(seed)
    w = draw.normal(size=(width, 16)) @ draw.normal(size=(16, width)) / 4 + 0.01 * draw.normal(size=(width, width))
    index = draw.choice(w.size, SPIKES, replace=False)
    w.ravel()[index] += 0.5 * draw.choice([-1, 1], SPIKES) * draw.uniform(1, 1.5, SPIKES)
    return w.astype(np.float32), set(index.tolist())
