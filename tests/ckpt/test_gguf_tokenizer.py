"""Tokenizers in the header of a GGUF file."""

import json

import pytest

from dsee_jax.ckpt import gguf_tokenizer
from dsee_jax.ckpt.tokenizer import load_tokenizer
from dsee_jax.errors import InputError


def opened(metadata, folder):
    for name, text in gguf_tokenizer.files(metadata).items():
        (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(folder)


def byte_level(**changes):
    tokens = ["<s>", "</s>", "<tool>", "Ġ", "Ċ", *"act1234's.Ã©", "at", "cat", "Ġcat", "34"]
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": list(dict.fromkeys(tokens)),
        "token_type": [3, 3, 4, *[1] * (len(dict.fromkeys(tokens)) - 3)],
        "merges": ["a t", "c at", "Ġ cat", "3 4"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["cat", "Ġcat", "Ġ", "1", "2", "34", ".", "Ċ"]),
        ("smollm", ["cat", "Ġcat", "Ġ", "1", "2", "3", "4", ".", "Ċ"]),
        ("qwen2", ["cat", "Ġcat", "Ġ", "1", "2", "3", "4", ".", "Ċ"]),
        ("llama-bpe", ["<s>", "cat", "Ġcat", "Ġ", "1", "2", "3", "4", ".", "Ċ"]),
    ],
)
def test_text_is_split_as_the_kind_of_file_says(pre, expected, tmp_path):
    tokenizer = opened(byte_level(pre=pre), tmp_path)
    ids = tokenizer("cat cat 1234.\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat cat 1234.\n"


def test_special_tokens_are_whole_and_named(tmp_path):
    settings = byte_level(add_eos_token=True, add_bos_token=True, padding_token_id=1)
    tokenizer = opened(settings | {"tokenizer.chat_template": "{{ 1 }}"}, tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a<tool>é</s>")["input_ids"]) == [
        *("<s>", "a", "<tool>", "Ã", "©", "</s>", "</s>")
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")
    assert tokenizer.chat_template == "{{ 1 }}"
    assert "<tool>" not in tokenizer.all_special_tokens


def test_all_ends_are_named():
    metadata = byte_level(eot_token_id=2, padding_token_id=0)
    assert gguf_tokenizer.special_ids(metadata) == {"bos_token_id": 0, "pad_token_id": 0, "eos_token_id": [1, 2]}


def test_sentencepiece_merges_by_scores(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "\u2581", "a", "c", "t", "ca", "at", "\u2581ca", "cat"]
    scores = [0.0] * 5 + [-20.0, -21.0, -22.0, -23.0, -2.0, -1.0, -3.0, -4.0]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": [2, 3, 3, 6, 6, *[1] * 8],
        **{"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0},
    }
    tokenizer = opened({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, tmp_path)
    ids = tokenizer("cat caé")["input_ids"]
    # "at" has the best score: the first word is merged from its end.
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "\u2581", "cat", "\u2581ca", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "cat caé"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(merges=[1, 2]), "holds a merge that is not two tokens"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.scores": ["b"]},
            "has 1 entries for 1 tokens; expected a number for each",
        ),
    ],
)
def test_values_of_another_type_are_named(metadata, message):
    with pytest.raises(InputError, match=message):
        gguf_tokenizer.files(metadata)
