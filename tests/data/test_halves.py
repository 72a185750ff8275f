"""The halves of a dev set: disjoint, whole, balanced, and the same for every seed."""

import json

import numpy as np
import pytest

from dsee_jax.config import DataConfig
from dsee_jax.data import Examples, Prompts, Questions, TaggedWords, Texts, halves, load
from dsee_jax.errors import InputError


def where(count):
    return [f"dev:{number}" for number in range(count)]


def rows(examples):
    """The numbers that end the texts of the rows."""
    return [int(text.split()[-1]) for text in examples[0]]


def classes(labels):
    return Examples([f"text {number}" for number in range(len(labels))], None, np.asarray(labels))


def test_halves_hold_every_example_once_with_equal_shares_of_each_class():
    labels = np.random.default_rng(0).choice(3, 101, p=[0.1, 0.3, 0.6]).astype(np.int32)
    choose, score = halves.divide("dev", classes(labels))
    assert sorted(rows(choose) + rows(score)) == list(range(101))
    assert rows(choose) == sorted(rows(choose))
    for half in (choose, score):
        np.testing.assert_array_equal(half.labels, labels[rows(half)])
    counts = [np.bincount(half.labels, minlength=3) for half in (choose, score)]
    assert np.abs(counts[0] - counts[1]).max() <= 1
    assert abs(len(choose.text) - len(score.text)) <= 1


@pytest.mark.parametrize(
    "examples",
    [
        classes(np.linspace(0, 5, 9, dtype=np.float32)),
        classes(np.eye(9, 4, dtype=np.float32)),
        TaggedWords([["word", str(number)] for number in range(9)], [[0, 1]] * 9, where(9)),
        Texts([f"text {number}" for number in range(9)], where(9)),
    ],
    ids=["numbers", "several labels", "tags", "texts"],
)
def test_halves_of_rows_without_classes_differ_by_one_row(examples):
    choose, score = halves.divide("dev", examples)
    assert type(choose) is type(score) is type(examples)
    assert sorted([len(choose[0]), len(score[0])]) == [4, 5]
    texts = [str(row) for half in (choose, score) for row in half[0]]
    assert sorted(texts) == sorted(map(str, examples[0]))


def test_references_of_a_prompt_are_in_one_half():
    """Each of ten prompts, some of them chats, has three references in places far apart."""
    prompts = [f"p {n}" if n % 2 else [{"role": "user", "content": f"p {n}"}] for n in range(10)] * 3
    examples = Prompts(prompts, [f"c {number}" for number in range(30)], where(30))
    choose, score = halves.divide("dev", examples)
    sides = [{json.dumps(prompt) for prompt in half.prompt} for half in (choose, score)]
    assert not sides[0] & sides[1]
    assert [*map(len, sides)] == [5, 5]
    assert len(choose.completion) == len(score.completion) == 15


def test_questions_about_a_text_are_in_one_half():
    contexts = [f"context {number // 3}" for number in range(24)]
    examples = Questions(where(24), contexts, [["a"]] * 24, [[0]] * 24, where(24))
    choose, score = halves.divide("dev", examples)
    assert not {*choose.context} & {*score.context}
    assert len(choose.question) == len(score.question) == 12


def test_long_text_is_cut_between_words():
    text = "the cat sees every dog and no bird runs"
    choose, score = halves.divide("dev", Texts([text], ["dev.txt:1"]))
    assert choose.text[0] + score.text[0] == text
    assert score.text[0].startswith(" ")
    assert abs(len(choose.text[0]) - len(score.text[0])) < 10


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (classes([0, 1, 1]), "dev set 'dev' has 3 texts; expected 4 or more"),
        (Prompts(["a", "b", "c"] * 5, ["x"] * 15, where(15)), "has 3 different prompts; expected 4"),
        (Texts([" x"], ["dev.txt:1"]), "dev.txt:1: data.split_dev cuts the text"),
    ],
)
def test_dev_set_too_small_to_divide_is_refused(examples, message):
    with pytest.raises(InputError, match=message):
        halves.divide("dev", examples)


def test_loaded_halves_do_not_depend_on_the_seed(tmp_path):
    (tmp_path / "held.txt").write_text("the cat runs")
    config = DataConfig(source="restaurants", split_dev=True, held_text=str(tmp_path / "held.txt"))
    one, other = (load(config, seed=seed, task="causal-lm") for seed in (0, 1))
    assert one.dev == other.dev
    assert one.scoring == other.scoring
    whole = load(DataConfig(source="restaurants"), seed=0, task="causal-lm")
    assert not whole.scoring
    assert list(one.dev) == ["dev", "held"]
    assert list(one.scoring) == ["dev"]
    both = one.dev["dev"].where + one.scoring["dev"].where
    assert sorted(both) == sorted(whole.dev["dev"].where)


def test_both_dev_sets_of_a_task_are_divided(tmp_path):
    lines = ["sentence1\tsentence2\tgold_label", *(f"a {n}\tb\tneutral" for n in range(6))]
    for name in ("train", "dev_matched", "dev_mismatched"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    loaded = load(DataConfig(source="glue", task="mnli", dir=str(tmp_path), split_dev=True), seed=0)
    assert list(loaded.dev) == list(loaded.scoring) == ["dev_matched", "dev_mismatched"]
    assert {len(half.text) for half in (*loaded.dev.values(), *loaded.scoring.values())} == {3}
