"""Batches by length: every example once per epoch, little padding, deterministic, and equal after a restart."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsee_jax.ckpt.tokenizer import load_tokenizer
from dsee_jax.data import glue, toy
from dsee_jax.data.batches import Batches, assemble, bucket_edges, epoch_batches, eval_batches, iterate, micro_batches
from dsee_jax.data.tokens import TeacherOutputs, Tokens, tokenize
from dsee_jax.errors import InputError


def ragged(lengths, seed=0):
    """Tokens of examples of these lengths: ids from 1 on; the label is the number of the example, pad_id is 9."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rng = np.random.default_rng(seed)
    ids, types = rng.integers(1, 1000, (2, offsets[-1])).astype(np.int32)
    return Tokens(ids, types % 2, offsets, np.arange(len(lengths), dtype=np.int32), 9)


def random_lengths(count, seed=0):
    return np.random.default_rng(seed).integers(3, 60, count)


def make(count=100, batch_size=8, epochs=2.5, seed=0):
    tokens = ragged(random_lengths(count))
    return Batches(tokens, batch_size, epochs, seed, bucket_edges(tokens.lengths))


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name])


def test_later_stage_goes_on_in_the_order_of_the_data():
    """From the middle of an epoch on, into the next one."""
    whole, first = make(epochs=3.0), 20
    later = dataclasses.replace(make(epochs=1.0), first=first)
    assert len(later) == later.steps_per_epoch == 13
    for number in (0, 5, 6, 12):
        assert_same(later[number], whole[first + number])
    assert_same(next(iterate(later)), whole[first])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.3]))
def test_edges_have_the_least_padding(lengths, limit, padding):
    """Brute force over all sets of edges: no smaller set reaches the limit, no set of that size has less padding."""
    lengths = np.array(lengths)
    sizes = np.unique(lengths)

    def padded(edges):
        return np.array(edges)[np.searchsorted(edges, lengths)].sum()

    def best(number):
        return min(padded([*inner, sizes[-1]]) for inner in itertools.combinations(sizes[:-1], number - 1))

    edges = bucket_edges(lengths, limit=limit, padding=padding)
    costs = {number: best(number) for number in range(1, min(limit, len(sizes)) + 1)}
    enough = [number for number, cost in costs.items() if lengths.sum() > cost * (1 - padding)]
    assert len(edges) == min(enough, default=len(costs))
    assert padded(edges) == costs[len(edges)]
    assert (np.diff(edges) > 0).all()
    assert edges[-1] == sizes[-1]


def test_assemble_literal():
    tokens = Tokens(
        np.array([5, 6, 7, 8, 4], np.int32),
        np.array([0, 0, 1, 0, 1], np.int32),
        np.array([0, 3, 5]),
        np.array([2, 1]),
        9,
    )
    batch = assemble(tokens, np.array([1, -1]), np.array([4, 6]))
    assert batch["input_ids"].tolist() == [[8, 4, 9, 9]] * 2
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0]] * 2
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0]] * 2
    assert batch["labels"].tolist() == [1, 1]
    assert batch["weights"].tolist() == [1.0, 0.0]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "input_ids": "int32",
        "attention_mask": "int32",
        "token_type_ids": "int32",
        "labels": "int64",
        "weights": "float32",
    }


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_has_every_example_once(count, batch_size, epoch):
    buckets = np.random.default_rng(count).integers(0, 4, count)
    rows = epoch_batches(buckets, batch_size, seed=7, epoch=epoch)
    assert rows.shape == (-(-count // batch_size), batch_size)
    assert sorted(rows[rows >= 0].tolist()) == list(range(count))
    assert (rows[:, 0] >= 0).all()
    assert sum((row < 0).any() for row in rows) <= 1


def test_lengths_and_epochs():
    batches = make(count=100, batch_size=8, epochs=2.5)
    assert (batches.steps_per_epoch, len(batches)) == (13, 33)
    assert len(make(count=240, batch_size=8, epochs=0.1)) == 3  # though 0.1 * 30 > 3 in floating point
    assert len(make(epochs=0)) == 0
    labels = np.concatenate([batches[step]["labels"][batches[step]["weights"] > 0] for step in range(13)])
    assert sorted(labels.tolist()) == list(range(100))
    assert {batches[step]["input_ids"].shape[1] for step in range(33)} <= set(batches.edges.tolist())
    with pytest.raises(IndexError):
        batches[33]


def test_batches_have_the_tokens_of_their_examples():
    """The tokens under the attention mask are the complete example; all others are padding."""
    batches = make()
    for batch in (batches[0], batches[20]):
        for row, label in enumerate(batch["labels"]):
            start, end = batches.tokens.offsets[label : label + 2]
            inside = batch["attention_mask"][row] == 1
            np.testing.assert_array_equal(batch["input_ids"][row, inside], batches.tokens.input_ids[start:end])
            np.testing.assert_array_equal(
                batch["token_type_ids"][row, inside], batches.tokens.token_type_ids[start:end]
            )
            assert (batch["input_ids"][row, ~inside] == 9).all()


def test_batches_depend_on_seed_and_step_only():
    """Reading steps in another order gives equal batches; epochs and seeds give different ones."""
    forward, backward, other = make(), make(), make(seed=1)
    for step in reversed(range(len(forward))):
        backward[step]
    for step in range(len(forward)):
        assert_same(forward[step], backward[step])
    first, second, elsewhere = (
        np.concatenate([batches[step]["labels"] for step in range(start, start + 13)])
        for batches, start in ((forward, 0), (forward, 13), (other, 0))
    )
    assert (first != second).any()
    assert (first != elsewhere).any()


@pytest.mark.parametrize("taken", [0, 5, 13, 20])
def test_iterator_resumes_in_the_middle_of_an_epoch(taken):
    """Stop after some batches, create a new iterator and set the state (through JSON): the remaining batches are equal."""
    batches = make()
    whole = list(iterate(batches))
    assert len(whole) == len(batches)
    for step, batch in enumerate(whole):
        assert_same(batch, batches[step])
    stopped = iterate(make())
    for _ in range(taken):
        next(stopped)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = iterate(make())
    resumed.set_state(state)
    rest = list(resumed)
    assert len(rest) == len(whole) - taken
    for batch, expected in zip(rest, whole[taken:], strict=True):
        assert_same(batch, expected)
    for batch, expected in zip(iterate(make(), start=taken), whole[taken:], strict=True):
        assert_same(batch, expected)


def test_no_epochs_give_no_batches():
    assert list(iterate(make(epochs=0))) == []


@pytest.mark.parametrize(("epochs", "first"), [(0.5, 0), (0.5, 3), (1.2, 4), (5.0, 2)])
def test_examples_of_a_stage_are_those_of_its_batches(epochs, first):
    """Of whole passes all; of a part of one, those that its batches have, without filler rows."""
    tokens = ragged(random_lengths(30))
    batches = Batches(tokens, 7, epochs, 1, bucket_edges(tokens.lengths), first)
    read = [batch["labels"][batch["weights"] > 0] for batch in map(batches.__getitem__, range(len(batches)))]
    assert batches.examples().tolist() == sorted({*np.concatenate(read).tolist()})
    assert len(batches.examples()) == 30 or epochs < 2


def test_evaluation_of_some_examples_has_no_others():
    tokens, some = ragged(random_lengths(30)), np.array([3, 4, 11, 20, 29])
    seen = np.concatenate([rows for _, rows in eval_batches(tokens, 2, bucket_edges(tokens.lengths), some)])
    assert sorted(seen) == some.tolist()
    assert (np.diff(tokens.lengths[seen]) <= 0).all()


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (8, 4), (30, 7)])
def test_evaluation_has_every_example_once(count, batch_size):
    tokens = ragged(random_lengths(count))
    seen = []
    for batch, indices in eval_batches(tokens, batch_size, bucket_edges(tokens.lengths)):
        assert batch["input_ids"].shape[0] == batch_size
        assert batch["weights"].tolist() == [1.0] * len(indices) + [0.0] * (batch_size - len(indices))
        np.testing.assert_array_equal(batch["labels"][: len(indices)], indices)
        seen += indices.tolist()
    assert sorted(seen) == list(range(count))


def test_micro_batches():
    assert micro_batches(32, 128, 0) == 1
    assert micro_batches(32, 128, 4096) == 1
    assert micro_batches(32, 128, 4095) == 2
    assert micro_batches(32, 128, 1000) == 8  # 4 x 128; 7 rows would fit, but do not divide 32
    assert micro_batches(6, 10, 20) == 3
    assert micro_batches(7, 10, 69) == 7
    with pytest.raises(InputError, match=r"data\.batch_tokens: 127 is less than one example of 128"):
        micro_batches(32, 128, 127)


@pytest.mark.parametrize("task", ["rte", "stsb", "sst2", "toy"])
def test_padding_of_real_data_is_below_a_tenth(shared, minilm, task):
    """Padding and filler rows together are less than a tenth of all positions of an epoch."""
    train = toy.load().train if task == "toy" else glue.load(task, str(shared / "data" / "glue")).train
    cut = slice(10_000)
    train = train._replace(text=train.text[cut], pair=train.pair and train.pair[cut], labels=train.labels[cut])
    tokens = tokenize(load_tokenizer(minilm), train, 128, vocab_size=30522)
    batches = Batches(tokens, 32, 1.0, 0, bucket_edges(tokens.lengths))
    real = positions = 0
    shapes = set()
    for step in range(len(batches)):
        batch = batches[step]
        real += int((batch["attention_mask"] * batch["weights"][:, None]).sum())
        positions += batch["attention_mask"].size
        shapes.add(batch["input_ids"].shape)
    assert real == tokens.lengths.sum()
    assert 1 - real / positions < 0.1
    assert len(shapes) <= 16


def test_batch_has_the_outputs_of_its_own_examples_and_tokens():
    """Whatever the order of the examples; a place without outputs has those of any other."""
    tokens = ragged([3, 5, 2])
    rows, edges = np.array([2, 0, -1]), np.array([5])
    by_row = tokens._replace(teacher=TeacherOutputs(np.array([2, 0, 1]), {"teacher": np.arange(3.0)}, by_token=False))
    assert assemble(by_row, rows, edges)["teacher"].tolist() == [1, 2, 1]
    by_token = tokens._replace(
        teacher=TeacherOutputs(np.arange(10), {"teacher": tokens.input_ids[:, None] + 0.5}, by_token=True)
    )
    batch = assemble(by_token, rows, edges)
    real = batch["attention_mask"] != 0
    np.testing.assert_array_equal(batch["teacher"][..., 0][real], batch["input_ids"][real] + 0.5)
