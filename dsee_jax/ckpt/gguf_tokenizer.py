"""The tokenizer in the header of a GGUF file, as the files of a Hugging Face folder."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsee_jax.errors import InputError, shorten
from dsee_jax.models.gguf_tokens import BYTE_LEVEL, SENTENCEPIECE, SPLITTINGS

_UNKNOWN, _CONTROL, _USER = 2, 3, 4
"""Of ``tokenizer.ggml.token_type``."""
_SPACE = "\u2581"
"""The space in the tokens of SentencePiece."""
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Field of ``tokenizer_config.json`` -> key of a GGUF file, after ``tokenizer.ggml.``."""


def special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ids of special tokens under the names of a ``config.json``; ``eos_token_id`` is a list of all ends."""
    ids = {key: _get(metadata, key, int) for key in (*_NAMED.values(), "eot_token_id")}
    ends = [ids[key] for key in ("eos_token_id", "eot_token_id") if ids[key] is not None]
    fields = {"bos_token_id": ids["bos_token_id"], "pad_token_id": ids["padding_token_id"]}
    return {name: value for name, value in fields.items() if value is not None} | (
        {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    )


def files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of ``tokenizer.json`` and ``tokenizer_config.json``.

    Raises:
      InputError: the header holds no tokenizer, one of a kind that is not supported, or one whose parts do not fit.
    """
    kind, tokens = _get(metadata, "model", str), _get(metadata, "tokens", list) or []
    types = _get(metadata, "token_type", list) or [1] * len(tokens)
    builders = {BYTE_LEVEL: _byte_level, SENTENCEPIECE: _sentencepiece}
    if kind not in builders or not tokens:
        raise InputError(
            f"'tokenizer.ggml.model' is {shorten(repr(kind))} with {len(tokens)} tokens; supported: {', '.join(builders)}"
        )
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise InputError(f"'tokenizer.ggml.tokens' has {len(tokens)} tokens, 'tokenizer.ggml.token_type' {len(types)}")
    if len(set(tokens)) < len(tokens):
        raise InputError("'tokenizer.ggml.tokens' holds a token twice: the file is damaged")
    names = {field: _token(metadata, key, tokens) for field, key in _NAMED.items()}
    names = {field: token for field, token in names.items() if token is not None}
    fast = builders[kind](metadata, tokens, names)
    from tokenizers import AddedToken

    for token, type_ in zip(tokens, types, strict=True):
        if type_ in (_UNKNOWN, _CONTROL) or token in names.values():
            fast.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif type_ == _USER:
            fast.add_tokens([AddedToken(token, normalized=False)])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    return {
        "tokenizer.json": fast.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings | names, indent=2, ensure_ascii=False) + "\n",
    }


def _get(metadata: Mapping[str, Any], key: str, kind: type) -> Any:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and type(value) is not kind:
        raise InputError(f"'tokenizer.ggml.{key}' is {shorten(repr(value))}; expected a {kind.__name__}")
    return value


def _token(metadata: Mapping[str, Any], key: str, tokens: list[str]) -> str | None:
    number = _get(metadata, key, int)
    if number is not None and not 0 <= number < len(tokens):
        raise InputError(f"'tokenizer.ggml.{key}' is {number}; there are {len(tokens)} tokens")
    return None if number is None else tokens[number]


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], names: Mapping[str, str]) -> Any:
    """Return a tokenizer of byte-level BPE, such as GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = _get(metadata, "pre", str)
    if pre not in SPLITTINGS:
        raise InputError(f"'tokenizer.ggml.pre' is {shorten(repr(pre))}; supported: {', '.join(SPLITTINGS)}")
    splitting = SPLITTINGS[pre]
    merges: list[Any] = [tuple(str(merge).split(" ")) for merge in _get(metadata, "merges", list) or ()]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if any(len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys() for merge in merges):
        raise InputError("'tokenizer.ggml.merges' holds a merge that is not two tokens of 'tokenizer.ggml.tokens'")
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitting.whole_words))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if splitting.single_digits else []
    steps += [pre_tokenizers.Split(Regex(splitting.regex), "isolated")] if splitting.regex else []
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splitting.regex)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    if splitting.nfc:
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    _surround(fast, metadata, names, bos=splitting.bos)
    return fast


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], names: Mapping[str, str]) -> Any:
    """Return a tokenizer of SentencePiece's BPE, such as that of the first Llama: scores order the merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _get(metadata, "scores", list) or []
    if len(scores) != len(tokens) or not all(isinstance(score, float | int) for score in scores):
        raise InputError(
            f"'tokenizer.ggml.scores' has {len(scores)} entries for {len(tokens)} tokens; expected a number for each"
        )
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [
        (-scores[number], ids[token[:cut]], ids[token[cut:]])
        for number, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    pairs = [(tokens[left], tokens[right]) for _, left, right in sorted(merges)]
    fast = Tokenizer(
        models.BPE(vocab=ids, merges=pairs, unk_token=names.get("unk_token"), fuse_unk=True, byte_fallback=True)
    )
    prefix = _get(metadata, "add_space_prefix", bool) is not False
    spaces = normalizers.Replace(" ", _SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    _surround(fast, metadata, names, bos=True)
    return fast


def _surround(fast: Any, metadata: Mapping[str, Any], names: Mapping[str, str], *, bos: bool) -> None:
    """Add the special tokens before and after a text; ``bos`` is the default of the kind of tokenizer."""
    from tokenizers import processors

    chosen = _get(metadata, "add_bos_token", bool)
    first = [names["bos_token"]] if "bos_token" in names and (bos if chosen is None else chosen) else []
    last = [names["eos_token"]] if "eos_token" in names and _get(metadata, "add_eos_token", bool) else []
    if first or last:
        special = [(token, fast.token_to_id(token)) for token in (*first, *last)]
        fast.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
            special_tokens=special,
        )
