"""Questions in SQuAD's layout, and the windows of their texts."""

import json

import numpy as np
import pytest

from dsee_jax import data
from dsee_jax.config import DataConfig
from dsee_jax.data import windows
from dsee_jax.data.examples import Questions
from dsee_jax.errors import InputError

CONTEXT = "the cat sees a dog . the bird hears every dog ."


def document(question="sees", answers=(("dog", 15),), context=CONTEXT):
    rows = [{"text": text, "answer_start": start} for text, start in answers]
    paragraph = {"context": context, "qas": [{"id": "1", "question": question, "answers": rows}]}
    return {"version": "1.1", "data": [{"title": "x", "paragraphs": [paragraph]}]}


def load(folder, content):
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return data.load(DataConfig(source="squad", dir=str(folder)), seed=0, task="question-answering")


def test_questions_are_read(tmp_path):
    task = load(tmp_path, document(answers=(("dog", 15), ("a dog", 13))))
    where = f"{tmp_path}/train.json: data[0]: paragraphs[0]: qas[0]"
    assert task.train == Questions(["sees"], [CONTEXT], [["dog", "a dog"]], [[15, 13]], [where])
    assert (task.problem, task.labels, task.num_labels, task.causal) == (
        "question-answering",
        ("start", "end"),
        2,
        False,
    )


def test_question_without_an_answer_points_at_the_first_token(tmp_path, tokenizer):
    content = document(answers=())
    content["data"][0]["paragraphs"][0]["qas"][0] |= {"is_impossible": True, "plausible_answers": [{"text": "dog"}]}
    task = load(tmp_path, content)
    assert isinstance(task.train, Questions)
    assert (task.train.answers, task.train.starts) == ([[]], [[]])
    assert not windows.tokenize(tokenizer, task.train, 9, stride=2, vocab_size=100).labels.any()
    content["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "dog", "answer_start": 15}]
    with pytest.raises(InputError, match="1 answers, and is_impossible is True"):
        load(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "train.json:1: not JSON: "),
        ([], "train.json: no list 'data'; expected the layout of SQuAD"),
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, r"data\[0\]: paragraphs\[0\]: no list 'qas'"),
        (document(answers=()), r"qas\[0\]: 0 answers, and is_impossible is None; expected one answer or more, or"),
        (document(answers=(("dog", 14),)), r"answers\[0\]: the answer 'dog' does not stand at answer_start 14"),
        (document(question=" "), r"qas\[0\]: 'question' is ' '; expected a text that is not blank"),
        ({"data": []}, "train.json: no questions"),
    ],
)
def test_bad_questions_are_one_line_with_their_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, content)


def questions(texts, answers, starts):
    return Questions(texts, [CONTEXT] * len(texts), answers, starts, [f"x:{n}" for n, _ in enumerate(texts, 1)])


def test_windows_hold_the_answer_or_point_at_the_first_token(tokenizer):
    """Windows of five tokens of the text share two; the text of the labelled tokens is the answer."""
    examples = questions(["sees", "the hears"], [["dog"], ["bird hears"]], [[15], [25]])
    tokens = windows.tokenize(tokenizer, examples, 9, stride=2, vocab_size=100)
    assert tokens.windows is not None
    assert max(tokens.lengths) == 9
    found = {0: [], 1: []}
    covered = {0: set(), 1: set()}
    for row, question in enumerate(tokens.windows.questions.tolist()):
        part = slice(tokens.offsets[row], tokens.offsets[row + 1])
        spans, (first, last) = tokens.windows.spans[part], tokens.labels[row]
        inside = spans[:, 0] >= 0
        assert tokenizer.convert_ids_to_tokens(tokens.input_ids[part][inside]) == [
            CONTEXT[begin:end] for begin, end in spans[inside]
        ]
        assert tokens.token_type_ids[part][inside].all()
        covered[question] |= set(spans[inside, 0].tolist())
        if last:
            found[question].append(CONTEXT[spans[first, 0] : spans[last, 1]])
        else:
            assert first == 0
    assert set(found[0]) == {"dog"}
    assert set(found[1]) == {"bird hears"}
    assert covered[0] == covered[1] == {0, 4, 8, 13, 15, 19, 21, 25, 30, 36, 42, 46}
    assert (tokens.labels.dtype, tokens.labels.shape) == (np.int32, (tokens.size, 2))


def test_question_that_leaves_no_room_is_named(tokenizer):
    examples = questions(["sees", "the the the the"], [["dog"]] * 2, [[15]] * 2)
    with pytest.raises(
        InputError, match="x:2: the question has 4 tokens; data.max_length 9 and data.stride 2 leave room for"
    ):
        windows.tokenize(tokenizer, examples, 9, stride=2, vocab_size=100)
