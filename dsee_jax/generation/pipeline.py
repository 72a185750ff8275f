"""Texts that go on from prompts: a decoder opened with its tokenizer and its updates."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax.ckpt import adapter, hf
from dsee_jax.ckpt.folders import ADAPTER, GENERATION, MODEL, read_json
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.data.tokens import ends, load_tokenizer, padding
from dsee_jax.errors import InputError
from dsee_jax.generation import texts
from dsee_jax.runtime import storage
from dsee_jax.typing import Key

log = logging.getLogger(__name__)

CHOICES = ("new_tokens", "beams", "length_penalty", "early_stopping", "temperature", "top_k", "top_p")
"""The options of `generation.Options` that a user chooses."""
OWN = ("repetition_penalty",)
"""Those that are the model's, from its files, where a user does not say otherwise; and the ends of a text."""
UNKNOWN: dict[str, tuple[Any, ...]] = {
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1, 1.0),
    "num_beam_groups": (1,),
    "diversity_penalty": (0, 0.0),
}
"""What else a model's files may ask of Hugging Face's generation, with the values besides None that ask for nothing."""


class Writer(NamedTuple):
    """A decoder that reads and writes text."""

    model: Any  # a Linen module with a config, task causal-lm
    params: Any
    updates: dict[str, Any]  # deltas, supports, scale, scale_sparse where there are updates
    tokenizer: Any
    eos: tuple[int, ...]
    own: dict[str, Any]  # `OWN` options that its files give


def opened(path: str | Path, *, dtype: str = "float32") -> Writer:
    """Open a model folder, hub id or package, or the folder of a run (or of an export with factors) with its updates.

    Raises:
      InputError: there is no such, it is no decoder, or the updates are not of this model.
    """
    local = storage.download(path)
    folder = local / MODEL if (local / MODEL).is_dir() else resolve(local if storage.remote(path) else path)
    model, params = hf.load_pretrained(folder, "causal-lm", dtype=dtype)
    updates: dict[str, Any] = {}
    if (local / ADAPTER).is_dir():
        kept = adapter.load(local / ADAPTER)
        adapter.check(local / ADAPTER, folder, params, kept)
        updates = {"deltas": kept.deltas, "supports": kept.supports}
        updates |= {name: kept.config[name] for name in ("scale", "scale_sparse")}
    tokenizer = load_tokenizer(folder)
    return Writer(model, params, updates, tokenizer, ends(folder, tokenizer), _habits(folder))


def _habits(folder: Path) -> dict[str, Any]:
    """Return the `OWN` options of a model's files; say which others are asked for that are not to be had here."""
    asked = read_json(folder / "config.json")
    asked |= read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    for name, harmless in UNKNOWN.items():
        value = asked.get(name)
        if value is not None and value not in harmless:
            log.warning("%s asks for %s = %r, which is not done here: texts may differ", folder, name, value)
    return {name: asked[name] for name in OWN if asked.get(name) is not None}


def complete(writer: Writer, prompts: Sequence[str], *, key: Key | None = None, **options: Any) -> list[str]:
    """Return what follows each prompt, the end of text left out.

    All prompts are one batch; options are `CHOICES` and `OWN`. Raises `InputError` as `generation.generate` does, and for a
    prompt that leaves no room in the model's positions.
    """
    tokenizer, size, longest = writer.tokenizer, writer.model.config.vocab_size, writer.model.config.longest
    rows = [list(tokenizer(prompt, verbose=False)["input_ids"]) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise InputError(f"the prompt {prompt!r} has no tokens: give some text")
        if longest is not None and len(row) >= longest:
            raise InputError(
                f"the prompt {prompt[:40]!r}... has {len(row)} tokens and the model {longest} positions, which leaves no "
                "room: shorten it"
            )
        if max(row) >= size:
            raise InputError(
                f"the tokenizer gives id {max(row)}, the model has {size} words: they are not of one model"
            )
    return texts.texts(
        writer.model,
        writer.params,
        tokenizer,
        rows,
        ends=writer.eos,
        pad=padding(tokenizer, writer.eos),
        batch_size=len(rows),
        updates=writer.updates,
        key=key,
        **(writer.own | options),
    )
