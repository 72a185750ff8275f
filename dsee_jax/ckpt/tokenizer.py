"""The tokenizer in the folder of a model."""

import os
import pathlib
from typing import Any

from dsee_jax.ckpt.resolve import resolve
from dsee_jax.errors import InputError

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tekken.json")
_PADDING = 128
"""Rows of an embedding are padded up to a multiple of at most this number."""


def has_vocabulary(folder: pathlib.Path) -> bool:
    """Return whether a folder holds a tokenizer with its vocabulary, in a format that `load_tokenizer` knows."""
    return any((folder / name).is_file() for name in (*_VOCABULARIES, *_SENTENCEPIECE))


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """Return the fast tokenizer of a model, one of Hugging Face's ``transformers``; no code of the folder is run.

    Args:
      path: a model folder, GGUF file, hub id or package:NAME, see `dsee_jax.ckpt.resolve.resolve`.

    Raises:
      InputError: as `resolve`; there is no vocabulary, which transformers replaces by one of special tokens alone; or it
        cannot be read.
    """
    # At import transformers advises to install PyTorch, which the tokenizer does not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    folder = resolve(path, weights=False)
    pieces = [name for name in _SENTENCEPIECE if (folder / name).is_file()]
    fix = "expected tokenizer.json or vocab.txt beside config.json"
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        if not pieces:
            raise InputError(f"no tokenizer in {str(path)!r}: it has no vocabulary; {fix}")
        fix = (
            f"{pieces[0]} alone needs the package sentencepiece: where it is installed, open the folder by AutoTokenizer of "
            "transformers and write tokenizer.json by its save_pretrained"
        )
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # a malformed tokenizer.json raises a bare Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"no tokenizer in {str(path)!r}; {fix} ({reason})") from None


def misfit(tokenizer: Any, vocab_size: int) -> str:
    """Return one line about a vocabulary too small for an embedding of ``vocab_size`` rows; empty: it fits.

    Embeddings have a few rows more than their tokenizers have ids: multiples of 64 or 128, and spare rows (in Phi-2, the most
    of well-known models, 2 %). Where more than a tenth is missing, the vocabulary is another model's or its file ends early.
    """
    count = len(tokenizer)
    if count >= 0.9 * vocab_size or (vocab_size - count < _PADDING and count >= 0.5 * vocab_size):
        return ""
    return (
        f"the tokenizer has {count} tokens and the embedding {vocab_size} rows: the vocabulary is of another model, or its "
        "file is incomplete: download or copy it again"
    )
