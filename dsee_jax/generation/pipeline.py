"""Text in, text out: load a decoder with its tokenizer and its updates, and complete prompts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsee_jax.ckpt import adapted, adapter, hf
from dsee_jax.ckpt.folders import ADAPTER, GENERATION, MODEL, MODEL_CONFIG, read_json
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.ckpt.tokenizer import load_tokenizer, misfit
from dsee_jax.data.tokens import check_ids, ends, pad_id
from dsee_jax.errors import InputError, shorten
from dsee_jax.generation import texts
from dsee_jax.generation.decoding import Options
from dsee_jax.generation.texts import Writer
from dsee_jax.runtime import storage
from dsee_jax.typing import Key

log = logging.getLogger(__name__)

CHOICES = ("new_tokens", "beams", "length_penalty", "early_stopping", "temperature", "top_k", "top_p")
"""The options of `generation.Options` that a user chooses; the model's files do not set them."""
FROM_FILES = ("repetition_penalty",)
"""The options that the model's files set, unless a user overrides them."""
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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
"""Options of Hugging Face's generation that this library ignores; with the values, besides None, that have no effect."""


def load(path: str | Path, *, other: str = "", dtype: str = "float32", allow_unknown: bool = False) -> Writer:
    """Return the decoder at ``path`` with its tokenizer; a run or an export with factors has its updates attached.

    Args:
      path: a model folder, GGUF file, hub id or package:NAME, or the folder of a run or of an export.
      other: the folder of an adapter of this library or of PEFT, or a hub id, in place of the run's own. Empty: none.
      dtype: of the matrix products, float32 or bfloat16.
      allow_unknown: ignore unknown fields of config.json with a warning.

    Raises:
      InputError: ``path`` does not exist or is no decoder, or the adapter belongs to another model.
    """
    local = storage.download(path)
    folder = local / MODEL if (local / MODEL).is_dir() else resolve(local if storage.remote(path) else path)
    model, params = hf.load_pretrained(folder, "causal-lm", dtype=dtype, allow_unknown=allow_unknown)
    updates = None
    if other:
        params, saved = adapted.attached(resolve(other), model, params, str(folder))
        updates = saved.adapter
    elif (local / ADAPTER).is_dir():
        saved = adapter.load(local / ADAPTER)
        adapter.check(local / ADAPTER, folder, params, saved)
        updates = saved.adapter
    tokenizer = load_tokenizer(folder)
    if line := misfit(tokenizer, model.config.vocab_size):
        log.warning("%s: %s", folder, line)
    end_ids = ends(folder, tokenizer)
    check_ids(pad := pad_id(tokenizer, end_ids), model.config.vocab_size)
    return Writer(model, params, updates, tokenizer, end_ids, pad, _file_options(folder))


def _file_options(folder: Path) -> dict[str, Any]:
    """Return the `FROM_FILES` options of a model's files; warn about `UNSUPPORTED` options."""
    config = read_json(folder / MODEL_CONFIG)
    config |= read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    for name, harmless in UNSUPPORTED.items():
        value = config.get(name)
        if value is not None and value not in harmless:
            shown = shorten(repr(value))
            log.warning("%s sets %s = %s, which is not supported and ignored: texts may differ", folder, name, shown)
    options = {name: config[name] for name in FROM_FILES if config.get(name) is not None}
    try:
        Options(**options)
    except InputError as error:
        raise InputError(f"{folder}: {error}; correct {GENERATION} or {MODEL_CONFIG}") from None
    return options


def complete(writer: Writer, prompts: Sequence[str], *, key: Key | None = None, **options: Any) -> list[str]:
    """Return the generated text of each prompt, without the prompt and the end of text; all prompts are one batch.

    Args:
      writer: from `load`.
      prompts: texts.
      key: decides the samples; needed with a temperature.
      **options: of `dsee_jax.generate`, without ``eos`` and ``pad``, which the model's files set.

    Raises:
      InputError: as `generation.generate`; one text instead of several; a prompt without tokens; a prompt that leaves no room
        in the model's positions.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts is the text {shorten(repr(prompts))}; expected a list of texts: pass [prompt]")
    tokenizer, size, longest = writer.tokenizer, writer.model.config.vocab_size, writer.model.config.longest
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"the prompt {shorten(repr(prompt))} is not UTF-8 text")
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
                f"the tokenizer gives id {max(row)} and the model's embedding has {size} rows: they belong to different models"
            )
    return texts.generate(writer, rows, batch_size=max(1, len(rows)), key=key, **options)
