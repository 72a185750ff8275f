"""The stages of a run: the data that each reads."""

import numpy as np
import pytest

import runs
from dsee_jax.train import stages
from dsee_jax.train.setup import prepare


def examples(source):
    """Return the ids of every example of a stage, without filler rows."""
    batches = [source[number] for number in range(len(source))]
    rows = [(row, keep) for batch in batches for row, keep in zip(batch["input_ids"], batch["weights"], strict=True)]
    return sorted(tuple(row[row > 0].tolist()) for row, keep in rows if keep)


@pytest.mark.parametrize("kind", ["unstructured", "earlybert"])
def test_stages_of_half_a_pass_each_read_every_example_once(tmp_path, kind):
    cut = {"prune__kind": "earlybert", "prune__heads": 1, "prune__search": 0.4} if kind == "earlybert" else {}
    options = cut | {"train__epochs": 0.6 if cut else 0.4, "train__retune_epochs": 0.6}
    made = prepare(runs.config(tmp_path, **options))
    names = [name for name in stages.names(made.config) if name in ("search", "tune", "retune")]
    first, second = (stages.training_stage(made, name).source for name in names)
    assert (len(first), len(second)) == (2, 3)
    assert sorted(examples(first) + examples(second)) == examples(stages.batches(made, 1))
    whole = stages.batches(made, 1)
    np.testing.assert_array_equal(first[0]["input_ids"], whole[0]["input_ids"])
