"""The task of a run, read and tokenised."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.config import Config, model_task
from dsee_jax.data import Examples, Prompts, Task, load, references, responses
from dsee_jax.data.batches import bucket_edges, micro_batches
from dsee_jax.data.packing import pack
from dsee_jax.data.tokens import Tokens, ends, load_tokenizer, padding, tokenize
from dsee_jax.errors import InputError
from dsee_jax.metrics import text
from dsee_jax.runtime import multihost


class Data(NamedTuple):
    """A task, tokenised."""

    task: Task
    train: Tokens
    dev: dict[str, Tokens]
    edges: np.ndarray  # padded lengths, increasing
    exercise: references.Exercise | None = None  # of causal-lm, where texts are to be written


def check_length(config: Config, folder: Path | str, model: Any) -> None:
    """Raise `InputError` for examples longer than the positions of the model in ``folder``."""
    longest = model.config.longest
    if longest is not None and config.data.max_length > longest:
        raise InputError(f"data.max_length is {config.data.max_length}; {folder} has {longest} positions: use fewer")


def read_task(config: Config) -> Task:
    """Return the task of a run; raises `InputError` as `dsee_jax.data.load` does."""
    return load(config.data, seed=config.train.seed, causal=model_task(config) == "causal-lm")


def read_data(config: Config, task: Task, folder: Path, model: Any) -> Data:
    """Return a task tokenised by the tokenizer in ``folder`` for ``model``; raises `InputError` where they do not fit.

    The processes of a job do this together: each encodes a part of the texts.
    """
    with multihost.raise_on_all():
        check_length(config, folder, model)
        tokenizer, exercise = load_tokenizer(folder), None
    if task.causal:
        (train, *others), exercise = _texts(config, task, folder, tokenizer, model)
    else:
        train, *others = (
            tokenize(tokenizer, examples, config.data.max_length, vocab_size=model.config.vocab_size)
            for examples in (task.train, *task.dev.values())
            if isinstance(examples, Examples)
        )
    types, known = max(int(tokens.token_type_ids.max()) for tokens in (train, *others)), model.config.type_vocab_size
    # A model without token types takes no notice of them.
    if known and types >= known:
        raise InputError(
            f"{folder}: the tokenizer gives token type {types}, the model has {known}: they are not of one model"
        )
    edges = bucket_edges(np.concatenate([tokens.lengths for tokens in (train, *others)]))
    micro_batches(config.train.batch_size, int(edges[-1]), config.data.batch_tokens)
    return Data(task, train, dict(zip(task.dev, others, strict=True)), edges, exercise)


def _texts(
    config: Config, task: Task, folder: Path, tokenizer: Any, model: Any
) -> tuple[list[Tokens], references.Exercise | None]:
    """Return the texts of a task of causal-lm, train first, packed where asked for, and what is to be written."""
    data, options, size = config.data, config.generate, model.config.vocab_size
    ending = ends(folder, tokenizer)
    pad = padding(tokenizer, ending)
    found, exercise = [], None
    for examples in (task.train, *task.dev.values()):
        assert isinstance(examples, Prompts)
        pairs = responses.encode(tokenizer, examples, ends=ending, vocab_size=size)
        laid = responses.lay(pairs, data.max_length, pad_id=pad, where=examples.where)
        found.append(pack(laid, data.max_length) if data.packing else laid)
        if options.new_tokens and examples is next(iter(task.dev.values())):
            exercise = references.exercise(tokenizer, ending, pad, pairs, examples.completion, most=options.prompts)
    if exercise is not None:
        with multihost.raise_on_all():
            text.need()
        longest, most = model.config.longest, max(map(len, exercise.prompts))
        if longest is not None and most + options.new_tokens > longest:
            raise InputError(
                f"generate.new_tokens is {options.new_tokens}; a prompt of {most} tokens and so many new ones are more than "
                f"the model's {longest} positions: ask for fewer, or for none with 0"
            )
    return found, exercise
