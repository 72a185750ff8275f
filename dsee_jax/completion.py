"""Texts that go on from prompts: a decoder opened with its tokenizer and its updates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax import finished, writing
from dsee_jax.aliases import Key
from dsee_jax.ckpt import adapter, hf
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.data.tokens import ends, load_tokenizer, padding
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
    return Writer(model, params, updates, tokenizer, ends(folder, tokenizer))


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
    return writing.texts(
        writer.model,
        writer.params,
        tokenizer,
        rows,
        ends=writer.eos,
        pad=padding(tokenizer, writer.eos),
        batch_size=len(rows),
        updates=writer.updates,
        key=key,
        **options,
    )
