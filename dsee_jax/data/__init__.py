"""Examples in, batches out: `load` a task, `tokenize` it, cut it into `Batches`."""

import dataclasses

import numpy as np

from dsee_jax.config import DataConfig
from dsee_jax.data import glue, text, tfds, toy
from dsee_jax.data.examples import Examples, Task
from dsee_jax.errors import InputError

__all__ = ["Examples", "Task", "load"]


def load(config: DataConfig, *, seed: int) -> Task:
    """Return the task that ``config`` names; ``config.examples`` training examples are drawn with ``seed``.

    Raises:
      InputError: the data cannot be read or are not what the task expects; see the module of each source.
    """
    if config.source in ("glue", "csv", "jsonl") and not config.dir:
        raise InputError(f"data.dir: empty; data.source {config.source!r} reads files: give their folder")
    match config.source:
        case "glue":
            task = glue.load(config.task, config.dir)
        case "csv" | "jsonl":
            task = text.load(config)
        case "tfds":
            task = tfds.load(config)
        case "toy":
            task = toy.load()
        case "e2e":
            raise InputError("data.source: 'e2e' arrives with text generation; use glue, csv, jsonl, tfds or toy")
    return dataclasses.replace(task, train=_draw(task.train, config.examples, seed))


def _draw(examples: Examples, count: int, seed: int) -> Examples:
    """Return ``count`` of the examples, in their order; 0 for all of them."""
    total = len(examples.labels)
    if not 0 <= count <= total:
        raise InputError(f"data.examples: {count} of {total} training examples; expected 0 (all) to {total}")
    if count in (0, total):
        return examples
    rows = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    pair = examples.pair
    return Examples([examples.text[row] for row in rows], pair and [pair[row] for row in rows], examples.labels[rows])
