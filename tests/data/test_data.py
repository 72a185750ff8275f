"""`load`: sources by name, and random subsets of the training set."""

import numpy as np
import pytest

from dsee_jax import data
from dsee_jax.config import DataConfig
from dsee_jax.errors import InputError


def test_toy_needs_no_files():
    task = data.load(DataConfig(), seed=0)
    assert task.name == "toy"
    assert task.labels == ("entailment", "neutral", "contradiction")
    assert (task.num_labels, task.regression) == (3, False)


def test_the_seed_decides_the_drawn_examples():
    """With one seed a larger subset contains a smaller one; texts, pairs and labels stay aligned."""
    whole = data.load(DataConfig(), seed=0).train
    small, same, large, other = (
        data.load(DataConfig(examples=count), seed=seed).train for count, seed in ((50, 3), (50, 3), (80, 3), (50, 4))
    )
    assert len(small.text) == len(small.pair or ()) == len(small.labels) == 50
    assert small.text == same.text
    assert small.text != other.text
    assert set(small.text) <= set(large.text)
    rows = [list(zip(e.text, e.pair or (), e.labels.tolist(), strict=True)) for e in (whole, small)]
    assert set(rows[1]) <= set(rows[0])
    np.testing.assert_array_equal(data.load(DataConfig(examples=4000), seed=3).train.labels, whole.labels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(examples=4001), r"data\.examples: 4001 of 4000 training examples"),
        (DataConfig(source="glue", task="rte"), r"data\.dir: empty; data\.source 'glue' reads files"),
        (DataConfig(source="csv", task="mine"), r"data\.dir: empty"),
    ],
)
def test_impossible_data_section_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        data.load(config, seed=0)
