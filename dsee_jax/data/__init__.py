"""The data of a run: `load` reads a task, `tokens.tokenize` encodes its texts, `batches.Batches` groups them into batches."""

import dataclasses
from typing import Any

import numpy as np

from dsee_jax.config import DataConfig
from dsee_jax.data import glue, prompts, restaurants, tables, tfds, toy
from dsee_jax.data.examples import Examples, Prompts, Task
from dsee_jax.errors import InputError
from dsee_jax.lazy import package

__all__ = ["Examples", "Prompts", "Task", "load"]

__getattr__, __dir__ = package(__name__, {})


def load(config: DataConfig, *, seed: int, causal: bool = False) -> Task:
    """Return the task that ``config`` names, with ``config.examples`` of its training examples, drawn with ``seed``.

    Args:
      config: the section ``data`` of a run.
      seed: decides which training examples are drawn.
      causal: True where csv and jsonl files hold prompts and completions.

    Raises:
      InputError: the data cannot be read or do not fit the task; the module of each source lists its errors.
    """
    if config.source in ("glue", "csv", "jsonl", "e2e") and not config.dir:
        raise InputError(f"data.dir: empty; data.source {config.source!r} reads files: set data.dir to their folder")
    match config.source:
        case "glue":
            task = glue.load(config.task, config.dir)
        case "csv" | "jsonl":
            task = prompts.load(config) if causal else tables.load(config)
        case "tfds":
            task = tfds.load(config)
        case "toy":
            task = toy.load()
        case "restaurants":
            task = restaurants.load()
        case "e2e":
            task = prompts.load(config)
    return dataclasses.replace(task, train=_draw(task.train, config.examples, seed))


def _draw(examples: Examples | Prompts, count: int, seed: int) -> Examples | Prompts:
    """Return ``count`` random examples in their original order; 0 = all examples."""
    total = len(examples[0])
    if not 0 <= count <= total:
        raise InputError(f"data.examples: {count} of {total} training examples; expected 0 (all) to {total}")
    if count in (0, total):
        return examples
    rows = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    columns: Any = examples
    kind: Any = type(examples)
    drawn = (
        column[rows] if isinstance(column, np.ndarray) else column and [column[r] for r in rows] for column in columns
    )
    return kind(*drawn)
