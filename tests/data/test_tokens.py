"""Ragged tokens: ids equal the tokenizer's, are truncated correctly, and have rows in the embedding."""

import numpy as np
import pytest

import tiny
from dsee_jax.ckpt.tokenizer import load_tokenizer
from dsee_jax.data import tokens
from dsee_jax.data.examples import Examples
from dsee_jax.errors import InputError


@pytest.fixture
def tokenizer(minilm):
    return load_tokenizer(minilm)


def test_ids_equal_those_of_the_tokenizer(tokenizer):
    texts = ["a dog runs", "unaffable", ""]
    got = tokens.tokenize(tokenizer, Examples(texts, None, np.array([1, 0, 1], np.int32)), 16, vocab_size=30522)
    for number, text in enumerate(texts):
        ids = got.input_ids[got.offsets[number] : got.offsets[number + 1]]
        assert ids.tolist() == tokenizer(text)["input_ids"]
    assert got.lengths.tolist() == [5, 5, 2]
    assert (got.input_ids.dtype, got.token_type_ids.dtype) == (np.int32, np.int32)
    assert not got.token_type_ids.any()
    assert got.pad_id == tokenizer.pad_token_id


def test_longer_sentence_is_truncated_first(tokenizer):
    examples = Examples(["a b c d e f g h"], ["x y z"], np.zeros(1, np.int32))
    got = tokens.tokenize(tokenizer, examples, 10, vocab_size=30522)
    assert " ".join(tokenizer.convert_ids_to_tokens(got.input_ids)) == "[CLS] a b c d [SEP] x y z [SEP]"
    assert got.token_type_ids.tolist() == [0] * 6 + [1] * 4


def test_chunk_size_does_not_change_tokens(tokenizer, monkeypatch):
    examples = Examples([f"word {n}" for n in range(7)], ["x"] * 7, np.zeros(7, np.int32))
    whole = tokens.tokenize(tokenizer, examples, 16, vocab_size=30522)
    monkeypatch.setattr(tokens, "CHUNK", 3)
    parts = tokens.tokenize(tokenizer, examples, 16, vocab_size=30522)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_unusable_tokenizer_or_length_is_refused(tokenizer, tmp_path):
    examples = Examples(["zebra"], ["b"], np.zeros(1, np.int32))
    with pytest.raises(InputError, match=r"vocabulary larger than the embedding.* 1000 rows"):
        tokens.tokenize(tokenizer, examples, 16, vocab_size=1000)
    with pytest.raises(InputError, match=r"data\.max_length: 3 leaves no room"):
        tokens.tokenize(tokenizer, examples, 3, vocab_size=30522)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    refused = {tmp_path: r"no tokenizer in .*tokenizer\.json", broken: r"no tokenizer in .*tokenizer\.json"}
    for path, line in (refused | {tmp_path / "nowhere": "the model folder .*nowhere does not exist"}).items():
        with pytest.raises(InputError, match=line) as error:
            load_tokenizer(path)
        assert "\n" not in str(error.value)


def test_texts_of_unknown_words_are_named(tmp_path, caplog):
    tiny.tokenizer(tmp_path)
    tokenizer, labels = load_tokenizer(tmp_path), np.zeros(2, np.int32)
    known = [word for word in tiny.VOCABULARY[5:] if word.isalpha()]
    tokens.tokenize(tokenizer, Examples([known[0], f"{known[1]} qqq"], None, labels), 16, vocab_size=99)
    assert not caplog.text
    tokens.tokenize(tokenizer, Examples(["qqq zzz", f"{known[1]} qqq"], None, labels), 16, vocab_size=99)
    assert "75 % of the tokens are [UNK]" in caplog.text
    with pytest.raises(InputError, match="none of the 2 examples has text"):
        tokens.tokenize(tokenizer, Examples(["", " "], None, labels), 16, vocab_size=99)


def test_padding_outside_the_embedding_is_refused(tmp_path):
    """A token that was added for padding, without a row of its own."""
    tiny.tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    examples = Examples([tiny.VOCABULARY[6]], None, np.zeros(1, np.int32))
    with pytest.raises(InputError, match="vocabulary larger than the embedding"):
        tokens.tokenize(tokenizer, examples, 16, vocab_size=len(tokenizer) - 1)
