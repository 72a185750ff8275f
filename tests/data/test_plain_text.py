"""Plain texts, and the blocks that a language model reads."""

import numpy as np
import pytest

from dsee_jax import data
from dsee_jax.config import DataConfig
from dsee_jax.data import blocks, plain_text
from dsee_jax.data.examples import Texts
from dsee_jax.errors import InputError

END = 3  # [SEP], with which the tokenizer ends a text


def tokenize(tokenizer, texts, length, ends=(END,)):
    examples = Texts(texts, [f"x:{number}" for number, _ in enumerate(texts, 1)])
    return blocks.tokenize(tokenizer, examples, length, ends=ends, pad_id=0, vocab_size=100)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 9, 100])
def test_every_token_but_the_first_is_predicted_once(tokenizer, length):
    texts = ["the cat", "a dog runs"]
    ids = np.concatenate(tokenizer(texts)["input_ids"])
    tokens = tokenize(tokenizer, texts, length)
    learnt = tokens.weights > 0
    assert tokens.labels[learnt].tolist() == ids[1:].tolist()
    assert tokens.input_ids[learnt].tolist() == ids[:-1].tolist()
    assert max(tokens.lengths) == min(length, len(ids))
    assert min(tokens.lengths) >= 2
    assert all(tokens.lengths[:-1] == min(length, len(ids)))
    assert tokens.weights[tokens.offsets[1:] - 1].tolist() == [0] * tokens.size


def test_text_ends_with_an_end_of_text(tokenizer):
    tokens = tokenize(tokenizer, ["cat"], 8, ends=(9, END))
    assert tokens.input_ids.tolist() == tokenizer("cat")["input_ids"]
    tokens = tokenize(tokenizer, ["cat"], 8, ends=(9,))
    assert tokens.input_ids.tolist() == [*tokenizer("cat")["input_ids"], 9]


def test_files_are_one_text_or_one_per_line(tmp_path):
    (tmp_path / "train.txt").write_text("the cat\n\nruns\n")
    (tmp_path / "valid.jsonl").write_text('{"text": "a dog"}\n\n{"text": "", "id": 1}\n')
    config = DataConfig(source="text", dir=str(tmp_path), held_text=str(tmp_path / "train.txt"))
    task = data.load(config, seed=0, task="causal-lm")
    assert (task.causal, task.problem, task.labels) == (True, "causal-lm", ())
    assert task.train == task.dev["held"] == Texts(["the cat\n\nruns\n"], [f"{tmp_path}/train.txt:1"])
    assert task.dev["dev"] == Texts(["a dog", ""], [f"{tmp_path}/valid.jsonl:{line}" for line in (1, 3)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"txt": "a"}', "x.jsonl:1: no 'text'.*did you mean 'txt'.*; expected one, found 'txt'"),
        ('{"text": 1}', "x.jsonl:1: 'text' is 1; expected a string"),
        ("", "x.jsonl: the file is empty"),
        (None, "x.jsonl: No such file or directory; expected a readable file"),
    ],
)
def test_bad_text_is_one_line_with_its_place(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        plain_text.read(str(tmp_path / "x.jsonl"))
