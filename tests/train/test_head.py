"""The trained part of the task head, and the order of its labels."""


import numpy as np
import pytest
from safetensors.numpy import load_file

import runs
import tiny
from dsee_jax import models, tree
from dsee_jax.ckpt import adapter, hf
from dsee_jax.errors import InputError
from dsee_jax.train import finished_run, setup

POOLER, CLASSIFIER = ["pooler/bias", "pooler/kernel"], ["classifier/bias", "classifier/kernel"]
SHORT = {"train__epochs": 0.2, "train__retune_epochs": 0.2}


def trained(config):
    return sorted(tree.flatten(setup.prepare(config).trained["params"]))


@pytest.mark.parametrize(
    ("family", "stored", "expected"),
    [
        ("bert", True, CLASSIFIER),
        ("bert", False, CLASSIFIER + POOLER),
        # Their poolers belong to the head, and Hugging Face creates them at random with it.
        ("roberta", True, CLASSIFIER + POOLER),
        ("deberta", True, CLASSIFIER + POOLER),
    ],
)
def test_only_a_pretrained_pooler_is_frozen(tmp_path, family, stored, expected):
    """As by the authors of DSEE, whose rule is the prefix of the encoder; a run and its plan agree."""
    tiny.bert(tmp_path / "base", num_hidden_layers=1, head=stored, model_type=family)
    runs.table(tmp_path / "data")
    config = runs.config(tmp_path)
    assert trained(config) == sorted(expected)
    if stored:
        model = hf.abstract_model(tmp_path / "base")
        assert sorted(tree.flatten(setup.trainable_params(config, model, models.shapes(model)))) == sorted(expected)
    assert trained(runs.config(tmp_path, train__head="pooler+classifier")) == sorted(CLASSIFIER + POOLER)
    if stored:
        assert trained(runs.config(tmp_path, train__head="classifier")) == CLASSIFIER
        assert trained(runs.config(tmp_path, model__new_head=True)) == sorted(expected)
    else:
        with pytest.raises(InputError, match=r"train.head is 'classifier'; .*base has no 'pooler/"):
            setup.prepare(runs.config(tmp_path, train__head="classifier"))


def test_full_tuning_trains_the_pooler():
    with pytest.raises(InputError, match="train.head is 'classifier'; expected auto: train.full trains every weight"):
        runs.configs.TrainConfig(full=True, head="classifier")


def test_frozen_pooler_stays_as_it_was(tmp_path):
    """In the model, in no adapter, in no count of trained parameters, and in the metrics from the files."""
    tiny.bert(tmp_path / "base", num_hidden_layers=1)
    runs.table(tmp_path / "data")
    results, out = runs.run(tmp_path, **SHORT)
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", out / "model"))
    np.testing.assert_array_equal(after["bert.pooler.dense.weight"], before["bert.pooler.dense.weight"])
    assert not np.array_equal(after["classifier.weight"], before["classifier.weight"])
    assert sorted(tree.flatten(adapter.load(out / "adapter").params)) == CLASSIFIER
    assert results["head_parameters"] == 24 * 2 + 2
    total = sum(array.size for array in after.values())
    assert results["backbone_parameters"] == total - 50
    updates = 2 * (2 * (24 + 24) + 5)
    assert results["trainable_fraction"] == updates / (total - 50)
    assert results["trainable_fraction_with_head"] == (updates + 50) / total
    kernels = 4 * 24 * 24 + 2 * 24 * 40
    assert results["flops_per_token"]["dense"] == 2 * kernels
    assert finished_run.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
