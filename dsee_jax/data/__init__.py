"""The data of a run: `load` reads a task, `tokens.tokenize` encodes its texts, `batches.Batches` groups them into batches."""

import dataclasses

import numpy as np

from dsee_jax.config import DataConfig
from dsee_jax.data import glue, halves, plain_text, prompts, restaurants, squad, tables, tagged, tfds, toy
from dsee_jax.data.examples import Examples, Prompts, Questions, Split, TaggedWords, Task, Texts, take
from dsee_jax.errors import InputError
from dsee_jax.lazy import package

__all__ = ["Examples", "Prompts", "Questions", "Split", "TaggedWords", "Task", "Texts", "load"]

HELD = "held"
"""The name of the dev set of ``data.held_text``."""

__getattr__, __dir__ = package(__name__, {})


def load(config: DataConfig, *, seed: int, task: str = "sequence-classification") -> Task:
    """Return the task that ``config`` names, with ``config.examples`` of its training examples, drawn with ``seed``.

    With ``config.split_dev`` each dev set is divided in two (`dsee_jax.data.halves`); ``config.held_text`` stays whole.

    Args:
      config: the section ``data`` of a run.
      seed: decides which training examples are drawn.
      task: of the model; it decides the columns of csv and jsonl files.

    Raises:
      InputError: the data cannot be read or do not fit the task; the module of each source lists its errors.
    """
    if config.source in ("glue", "csv", "jsonl", "e2e", "conll", "text", "squad") and not config.dir:
        raise InputError(f"data.dir: empty; data.source {config.source!r} reads files: set data.dir to their folder")
    match config.source:
        case "glue":
            loaded = glue.load(config.task, config.dir)
        case "csv" | "jsonl":
            read = {"causal-lm": prompts.load, "token-classification": tagged.load}.get(task, tables.load)
            loaded = read(config)
        case "tfds":
            loaded = tfds.load(config)
        case "toy":
            loaded = toy.load()
        case "restaurants":
            loaded = restaurants.load()
        case "e2e":
            loaded = prompts.load(config)
        case "conll":
            loaded = tagged.load(config)
        case "text":
            loaded = plain_text.load(config)
        case "squad":
            loaded = squad.load(config)
    held = {HELD: plain_text.read(config.held_text)} if config.held_text else {}
    dev, scoring = loaded.dev, {}
    if config.split_dev:
        parts = {name: halves.divide(name, examples) for name, examples in dev.items()}
        dev, scoring = ({name: part[half] for name, part in parts.items()} for half in range(2))
    train = _draw(loaded.train, config.examples, seed)
    return dataclasses.replace(loaded, train=train, dev={**dev, **held}, scoring=scoring)


def _draw(examples: Split, count: int, seed: int) -> Split:
    """Return ``count`` random examples in their original order; 0 = all examples."""
    total = len(examples[0])
    if not 0 <= count <= total:
        raise InputError(f"data.examples: {count} of {total} training examples; expected 0 (all) to {total}")
    if count in (0, total):
        return examples
    return take(examples, np.sort(np.random.default_rng(seed).permutation(total)[:count]))
