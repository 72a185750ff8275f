"""The task of a run: its examples, read and tokenised."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax.ckpt.tokenizer import load_tokenizer, misfit
from dsee_jax.config import Config, model_task
from dsee_jax.data import (
    Examples,
    Prompts,
    Questions,
    Split,
    TaggedWords,
    Task,
    Texts,
    blocks,
    load,
    responses,
    windows,
    word_tokens,
)
from dsee_jax.data.batches import bucket_edges, micro_batches
from dsee_jax.data.packing import pack
from dsee_jax.data.references import References, group_by_prompt
from dsee_jax.data.tokens import Tokens, check_ids, ends, pad_id, tokenize
from dsee_jax.errors import InputError
from dsee_jax.metrics import text
from dsee_jax.models.architecture import Model
from dsee_jax.runtime import multihost


class Data(NamedTuple):
    """A tokenised task."""

    task: Task
    train: Tokens
    dev: dict[str, Tokens]
    scoring: dict[str, Tokens]  # the other halves of the dev sets, of ``Task.scoring``
    edges: np.ndarray  # padded lengths, increasing
    references: References | None = None  # for causal-lm with generated texts: the references that score them


def check_length(config: Config, folder: Path | str, model: Model) -> None:
    """Raise `InputError` if ``data.max_length`` exceeds the positions of ``model``; ``folder`` names it in the message."""
    longest = model.config.longest
    if longest is not None and config.data.max_length > longest:
        raise InputError(f"data.max_length is {config.data.max_length}; {folder} has {longest} positions: use fewer")


def read_task(config: Config) -> Task:
    """Return the task of a run; raises like `dsee_jax.data.load`."""
    return load(config.data, seed=config.train.seed, task=model_task(config))


def read_data(config: Config, task: Task, folder: Path, model: Model) -> Data:
    """Return ``task``, tokenised by the tokenizer in ``folder``; raises `InputError` if ``model`` cannot read the tokens.

    A collective call in a distributed run: each process encodes one part of the texts.
    """
    with multihost.raise_on_all():
        check_length(config, folder, model)
        tokenizer, references = load_tokenizer(folder), None
        if not config.model.allow_small_vocabulary and (line := misfit(tokenizer, model.config.vocab_size)):
            raise InputError(f"{folder}: {line}; if it is meant, set model.allow_small_vocabulary: true")
    if task.causal:
        (train, *others), references = _causal(config, task, folder, tokenizer, model)
    else:
        size = model.config.vocab_size
        train, *others = (_encode(config, examples, tokenizer, size) for examples in _splits(task))
    largest, types = max(int(tokens.token_type_ids.max()) for tokens in (train, *others)), model.config.type_vocab_size
    # A model without token types ignores them.
    if types and largest >= types:
        raise InputError(
            f"{folder}: the tokenizer gives token type {largest}, the model has {types}: they belong to different models"
        )
    lengths = np.concatenate([tokens.lengths for tokens in (train, *others)])
    edges = bucket_edges(lengths, limit=config.data.buckets)
    micro_batches(config.train.batch_size, int(edges[-1]), config.data.batch_tokens)
    dev = dict(zip(task.dev, others[: len(task.dev)], strict=True))
    scoring = dict(zip(task.scoring, others[len(task.dev) :], strict=True))
    return Data(task, train, dev, scoring, edges, references)


def _splits(task: Task) -> tuple[Split, ...]:
    return task.train, *task.dev.values(), *task.scoring.values()


def _encode(config: Config, examples: Split, tokenizer: Any, vocab_size: int) -> Tokens:
    """Return the tokens of a training or dev set of an encoder."""
    longest = config.data.max_length
    match examples:
        case TaggedWords():
            return word_tokens.tokenize(tokenizer, examples, longest, vocab_size=vocab_size)
        case Questions():
            stride = config.data.stride or longest // 3
            return windows.tokenize(tokenizer, examples, longest, stride=stride, vocab_size=vocab_size)
        case Examples():
            return tokenize(tokenizer, examples, longest, vocab_size=vocab_size)
    raise AssertionError(f"{type(examples).__name__} are for decoders")


def _causal(
    config: Config, task: Task, folder: Path, tokenizer: Any, model: Model
) -> tuple[list[Tokens], References | None]:
    """Return the tokens of a causal-lm task, train first, packed with ``data.packing``, and the references for scores."""
    data, options, size = config.data, config.generate, model.config.vocab_size
    end_ids = ends(folder, tokenizer)
    check_ids(pad := pad_id(tokenizer, end_ids), size)
    splits, references = [], None
    scored = next(iter((task.scoring or task.dev).values()))
    for examples in _splits(task):
        if isinstance(examples, Texts):
            splits.append(
                blocks.tokenize(tokenizer, examples, data.max_length, ends=end_ids, pad_id=pad, vocab_size=size)
            )
            continue
        assert isinstance(examples, Prompts)
        pairs = responses.encode(tokenizer, examples, ends=end_ids, vocab_size=size)
        tokens = responses.to_tokens(pairs, data.max_length, pad_id=pad, where=examples.where)
        splits.append(pack(tokens, data.max_length) if data.packing else tokens)
        if options.new_tokens and examples is scored:
            references = group_by_prompt(tokenizer, end_ids, pad, pairs, examples.completion, most=options.prompts)
    if references is not None:
        with multihost.raise_on_all():
            text.need()
        longest, most = model.config.longest, max(map(len, references.prompts))
        if longest is not None and most + options.new_tokens > longest:
            raise InputError(
                f"generate.new_tokens is {options.new_tokens}; with a prompt of {most} tokens this is more than "
                f"the model's {longest} positions: set fewer, or 0 for no texts"
            )
    return splits, references
