"""The examples on which the comparison of pruning scores calibrates."""

import numpy as np
import pytest

from benchmarks import scores
from dsee_jax.data.batches import Batches
from dsee_jax.data.tokens import Tokens


@pytest.mark.parametrize(("count", "batches", "examples"), [(128, 3, 10), (10, 3, 10), (5, 2, None), (4, 1, None)])
def test_calibration_data_is_no_more_than_there_is_and_has_no_filler_rows(count, batches, examples):
    """Ten examples in batches of four, of which one has two filler rows; whole batches are read."""
    ids = np.arange(20, dtype=np.int32)
    tokens = Tokens(ids, np.zeros_like(ids), np.arange(0, 21, 2), np.arange(10, dtype=np.int32), 0)
    source = Batches(tokens, 4, epochs=1, seed=0, edges=np.array([2]))
    whole, apart = scores.calibration_data(source, count)
    assert len(whole) == batches
    labels = [int(example["labels"][0]) for example in apart]
    assert len(labels) == len({*labels}) == sum(int(batch["weights"].sum()) for batch in whole)
    assert examples is None or len(labels) == examples
    assert all(example["input_ids"].shape == (1, 2) and example["weights"] == 1 for example in apart)
