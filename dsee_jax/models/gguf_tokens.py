"""The kinds of tokenizers under the names that GGUF files give them, which are those of models.

The splittings are those of llama.cpp: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp.
"""

from typing import NamedTuple

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""``tokenizer.ggml.model``."""


class Splitting(NamedTuple):
    """How a text is split into the parts that byte-level merges stay in."""

    regex: str = ""
    """Matches one part; empty: GPT-2's."""
    single_digits: bool = False
    """Split off every digit first."""
    nfc: bool = False
    """Normalise the text to Unicode's NFC first."""
    whole_words: bool = False
    """Look up a whole part before its merges."""
    bos: bool = False
    """A text begins with the token of the beginning, unless the file says otherwise."""


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = Splitting(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True)
_LLAMA3 = Splitting(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True, bos=True)

SPLITTINGS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
"""``tokenizer.ggml.pre`` -> the splitting of byte-level BPE."""
