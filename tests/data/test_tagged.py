"""Tagged words from JSON lines and CoNLL files, and their tokens."""

import json

import numpy as np
import pytest

from dsee_jax import data
from dsee_jax.config import DataConfig
from dsee_jax.data import word_tokens
from dsee_jax.data.examples import TaggedWords
from dsee_jax.errors import InputError

ROWS = [{"tokens": ["the", "big", "cat"], "tags": ["O", "B-A", "I-A"]}, {"tokens": ["runs"], "tags": ["O"]}]
CONLL = "-DOCSTART- -X- O\n\nthe DT O\nbig JJ B-A\ncat NN I-A\n\n\nruns VB O"


def load(folder, content, source="jsonl", **options):
    name = {"jsonl": "jsonl", "conll": "conll"}[source]
    for split in ("train", "dev"):
        (folder / f"{split}.{name}").write_text(content)
    return data.load(DataConfig(source=source, dir=str(folder), **options), seed=0, task="token-classification")


@pytest.mark.parametrize("source", ["jsonl", "conll"])
def test_words_and_tags_are_read(tmp_path, source):
    task = load(tmp_path, "\n".join(map(json.dumps, ROWS)) if source == "jsonl" else CONLL, source)
    assert (task.labels, task.problem, task.problem_type) == (("B-A", "I-A", "O"), "token-classification", "")
    assert isinstance(task.train, TaggedWords)
    assert task.train.words == [["the", "big", "cat"], ["runs"]]
    assert task.train.tags == [[2, 0, 1], [2]]
    line = 2 if source == "jsonl" else 8
    assert task.train.where[1] == f"{tmp_path}/train.{source}:{line}"


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (
            '{"tokens": ["a"], "ner_tags": [1]}',
            "jsonl",
            ":1: no 'tags'.*; expected tokens and tags, found 'tokens', 'ner_tags'",
        ),
        ('{"tokens": ["a"], "tags": ["O", "O"]}', "jsonl", ":1: 1 tokens and 2 tags; expected a tag for each token"),
        ('{"tokens": "a b", "tags": ["O", "O"]}', "jsonl", ":1: 'tokens' is 'a b'; expected a list of one or more"),
        ('{"tokens": ["a", " "], "tags": ["O", "O"]}', "jsonl", ":1: the token ' ' is no word"),
        ('{"tokens": ["a", "b"], "tags": ["O", null]}', "jsonl", ":1: the label 'tags' is 'null'; expected text"),
        ('{"tokens": ["a", "b"], "tags": ["O", "O"]}', "jsonl", "train.jsonl: every tag is 'O'; a task needs two"),
        ('{"tokens": ["a", "b", "c"], "tags": ["O", "B-A", "S-A"]}', "jsonl", "the tag 'S-A' is not of IOB2"),
        ("a O\nb B-A\nc\n", "conll", "train.conll:3: 1 columns in 'c'; expected 2: a word first"),
        ("a X O\nb B-A\n", "conll", "train.conll:2: 2 columns in 'b B-A'; expected 3"),
        ("-DOCSTART- O\n\n", "conll", "train.conll: no texts; expected words with tags"),
    ],
)
def test_bad_words_and_tags_are_one_line_with_their_place(tmp_path, content, source, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, content, source)


def test_tag_outside_of_the_task_is_named_with_its_line(tmp_path):
    with pytest.raises(InputError, match=r"train.conll:3: label 'B-A' is outside the task; expected one of 'O', 'B-B'"):
        load(tmp_path, CONLL, "conll", labels=("O", "B-B"))


def test_first_token_of_a_word_has_its_tag(tokenizer):
    """The word abc is three tokens; as with words given to the tokenizer one by one."""
    examples = TaggedWords([["abc", "cat"], ["the", "dog."]], [[1, 2], [2, 1]], ["x:1", "x:2"])
    tokens = word_tokens.tokenize(tokenizer, examples, 8, vocab_size=100)
    encoded = tokenizer(examples.words, is_split_into_words=True)
    for row in range(2):
        part = slice(tokens.offsets[row], tokens.offsets[row + 1])
        words = encoded.word_ids(row)
        firsts = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        assert tokens.input_ids[part].tolist() == encoded["input_ids"][row]
        assert tokens.weights[part].tolist() == firsts
        assert tokens.labels[part][firsts].tolist() == examples.tags[row]
    assert tokens.labels.dtype == np.int32


def test_words_past_the_longest_text_do_not_count(tokenizer, caplog):
    examples = TaggedWords([["the", "cat", "runs"]], [[1, 2, 1]], ["x:1"])
    tokens = word_tokens.tokenize(tokenizer, examples, 4, vocab_size=100)
    assert tokens.weights.tolist() == [0, 1, 1, 0]
    assert "1 of 3 words have no token, as data.max_length = 4 ends their texts" in caplog.text
    with pytest.raises(InputError, match="data.max_length: 2 leaves no room"):
        word_tokens.tokenize(tokenizer, examples, 2, vocab_size=100)
    with pytest.raises(InputError, match="x:1: no word of the text has a token"):
        word_tokens.tokenize(tokenizer, TaggedWords([["\u200b"]], [[0]], ["x:1"]), 4, vocab_size=100)
