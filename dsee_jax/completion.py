"""Texts that go on from prompts: a decoder opened with its tokenizer and its updates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax import finished, generation
from dsee_jax.aliases import Key
from dsee_jax.ckpt import adapter, hf
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.data.tokens import load_tokenizer
from dsee_jax.errors import InputError
from dsee_jax.export import ADAPTER, MODEL

CHOICES = ("new_tokens", "beams", "length_penalty", "early_stopping", "temperature", "top_k", "top_p")
"""The options of `generation.Options` that a user chooses; the others are the model's."""


class Writer(NamedTuple):
    """A decoder that reads and writes text."""

    model: Any  # a Linen module with a config, task causal-lm
    params: Any
    updates: dict[str, Any]  # deltas, supports, scale, scale_sparse where there are updates
    tokenizer: Any
    eos: tuple[int, ...]


def opened(path: str | Path, *, dtype: str = "float32") -> Writer:
    """Open a model folder, hub id or package, or the folder of a run (or of an export with factors) with its updates.

    Raises:
      InputError: there is no such, it is no decoder, or the updates are not of this model.
    """
    local = Path(path).expanduser()
    folder = local / MODEL if (local / MODEL).is_dir() else resolve(path)
    model, params = hf.load_pretrained(folder, "causal-lm", dtype=dtype)
    updates: dict[str, Any] = {}
    if (local / ADAPTER).is_dir():
        kept = adapter.load(local / ADAPTER)
        finished.check_adapter(local, params, kept)
        updates = {"deltas": kept.deltas, "supports": kept.supports}
        updates |= {name: kept.config[name] for name in ("scale", "scale_sparse")}
    tokenizer = load_tokenizer(folder)
    return Writer(model, params, updates, tokenizer, _eos(folder, tokenizer))


def _eos(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The ends of text that the first of generation_config.json, config.json and the tokenizer names."""
    for name in ("generation_config.json", "config.json"):
        found = hf.read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def complete(writer: Writer, prompts: Sequence[str], *, key: Key | None = None, **options: Any) -> list[str]:
    """Return what follows each prompt, the end of text left out.

    All prompts are one batch; options are `CHOICES`, and raise `InputError` as `generation.generate` does.
    """
    tokenizer, size = writer.tokenizer, writer.model.config.vocab_size
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise InputError(f"the prompt {prompt!r} has no tokens: give some text")
        if max(row) >= size:
            raise InputError(
                f"the tokenizer gives id {max(row)}, the model has {size} words: they are not of one model"
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (*writer.eos, 0)[0]
    ids, mask = generation.pad_left(rows, pad=pad)
    found = generation.generate(
        writer.model, writer.params, ids, mask, key=key, eos=writer.eos, pad=pad, **writer.updates, **options
    )
    return [_text(tokenizer, row, _whole(new, writer.eos)) for row, new in zip(rows, np.asarray(found), strict=True)]


def _whole(tokens: np.ndarray, eos: tuple[int, ...]) -> list[int]:
    ends = np.flatnonzero(np.isin(tokens, eos))
    return tokens[: ends[0] if len(ends) else None].tolist()


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Decode together: how a first token is written depends on what stands before it."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + new, skip_special_tokens=True)[len(before) :]
