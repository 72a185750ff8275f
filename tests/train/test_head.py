"""The trained part of the task head, and the order of its labels."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import runs
import tiny
from dsee_jax import models, tree
from dsee_jax.ckpt import adapter, hf
from dsee_jax.config import Config, DeltaConfig, PruneConfig
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
        pytest.param("deberta", True, CLASSIFIER + POOLER, marks=pytest.mark.exhaustive),
    ],
)
def test_only_a_pretrained_pooler_is_frozen(tmp_path, family, stored, expected):
    """As by the authors of DSEE, whose rule is the prefix of the encoder; a run and its plan agree."""
    tiny.bert(tmp_path / "base", num_hidden_layers=1, head=stored, model_type=family)
    runs.table(tmp_path / "data")
    config = runs.config(tmp_path)
    assert trained(config) == sorted(expected)
    model = hf.abstract_model(tmp_path / "base")
    moving = setup.trainable_params(config, tmp_path / "base", model, models.shapes(model))
    assert sorted(tree.flatten(moving)) == sorted(expected)
    assert trained(runs.config(tmp_path, train__head="pooler+classifier")) == sorted(CLASSIFIER + POOLER)
    if stored:
        assert trained(runs.config(tmp_path, train__head="classifier")) == CLASSIFIER
        assert trained(runs.config(tmp_path, model__new_head=True)) == sorted(expected)
    else:
        with pytest.raises(InputError, match=r"train.head is 'classifier'; .*base has no 'pooler/"):
            setup.prepare(runs.config(tmp_path, train__head="classifier"))


def test_pooler_of_a_sentence_encoder_is_trained(tmp_path):
    """Its own training leaves the pooler out, and a frozen pooler that never learnt anything keeps a run from learning."""
    tiny.bert(tmp_path / "base", num_hidden_layers=1, head=True)
    runs.table(tmp_path / "data")
    assert trained(runs.config(tmp_path)) == CLASSIFIER
    (tmp_path / "base" / "modules.json").write_text("[]")
    assert trained(runs.config(tmp_path)) == sorted(CLASSIFIER + POOLER)


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


def named(folder, names, *, permuted=False):
    """Name the classes of the checkpoint in ``folder``; ``permuted``: put the last row of its classifier first."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {str(number): name for number, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config | {"label2id": {name: n for n, name in enumerate(names)}}))
    if permuted:
        arrays = load_file(folder / "model.safetensors")
        arrays |= {n: np.roll(x, 1, 0).copy() for n, x in arrays.items() if n.startswith("classifier.")}
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("label", [("no", "yes"), ("No", "YES"), ("LABEL_0", "LABEL_1"), ("0", "1")], ids=str)
def test_classifier_is_read_by_the_names_of_its_classes(tmp_path, label):
    """The same classifier with rows and names in another order is the same; where classes have only numbers it is not."""
    runs.table(tmp_path / "data")
    tiny.bert(tmp_path / "base", num_hidden_layers=1, seed=2)
    named(tmp_path / "base", label)
    first = setup.prepare(runs.config(tmp_path))
    named(tmp_path / "base", label[::-1], permuted=True)
    second = setup.prepare(runs.config(tmp_path))
    numbered = label[0] in ("LABEL_0", "0")
    for path, axis in (("classifier/kernel", 1), ("classifier/bias", 0)):
        one, other = (np.asarray(tree.get(made.params, path)) for made in (first, second))
        np.testing.assert_array_equal(other, np.flip(one, axis) if numbered else one)
    assert first.data.task.labels == second.data.task.labels == (("no", "yes") if numbered else label)


def test_run_keeps_the_class_names_of_its_checkpoint(tmp_path):
    """In the order of its logits; evaluation and export read the classes of the model by name as well.

    The loss of another task is replaced: transformers takes sigmoid or softmax from problem_type.
    """
    runs.table(tmp_path / "data")
    tiny.bert(tmp_path / "base", num_hidden_layers=1, problem_type="multi_label_classification")
    named(tmp_path / "base", ("YES", "NO"))
    results, out = runs.run(tmp_path, prune__kind="none", **SHORT)
    config = json.loads((out / "model/config.json").read_text())
    assert config["id2label"] == {"0": "NO", "1": "YES"}
    assert config["problem_type"] == "single_label_classification"
    assert adapter.load(out / "adapter").config["labels"] == ["NO", "YES"]
    again = finished_run.evaluate(out, ['data.labels=["yes", "no"]'])
    assert again == pytest.approx(results["final"], rel=1e-5)


def test_labels_that_are_numbers_are_the_places_of_the_classes(tmp_path, caplog):
    """Tables often hold the index of a class that the checkpoint names."""
    runs.table(tmp_path / "data")
    for name in ("train.csv", "dev.csv"):
        table = tmp_path / "data" / name
        table.write_text(table.read_text().replace(",no\n", ",0\n").replace(",yes\n", ",1\n"))
    tiny.bert(tmp_path / "base", num_hidden_layers=1)
    named(tmp_path / "base", ("NEGATIVE", "POSITIVE"))
    assert setup.prepare(runs.config(tmp_path)).data.task.labels == ("0", "1")
    assert "class i is the one of 'NEGATIVE', 'POSITIVE'" in caplog.text


@pytest.mark.parametrize("names", [("negative", "positive"), ("no", "maybe"), ("no", "No")])
def test_classifier_of_other_classes_is_refused(tmp_path, names):
    runs.table(tmp_path / "data")
    tiny.bert(tmp_path / "base", num_hidden_layers=1)
    named(tmp_path / "base", names)
    with pytest.raises(
        InputError, match=r"config.json: id2label names the classes .*; the task has 'no', 'yes': set model.new"
    ):
        runs.run(tmp_path)
    assert not (tmp_path / "run").exists()
    assert setup.prepare(runs.config(tmp_path, model__new_head=True)).data.task.labels == ("no", "yes")


def test_word_pruned_stands_for_the_targets_of_pruning(tmp_path):
    """Also where nothing is pruned, and beside other rules."""
    model = hf.abstract_model(tiny.bert(tmp_path), "sequence-classification", 2)
    prune = PruneConfig(kind="none", targets=["key", "output.dense"])
    made = setup.with_rules(Config(delta=DeltaConfig(targets=["pruned", "query"]), prune=prune), model)
    assert made.delta.targets[:-1] == made.prune.targets
    assert made.delta.targets[-1] == "query"
    assert len(made.prune.targets) > 1


def test_budget_is_a_share_of_all_weights_but_the_trained_head():
    """Rank r trains 20 r of the 100 weights below the head."""
    params = {"kernel": np.ones((10, 10), np.float32), "head": {"kernel": np.ones((20, 10), np.float32)}}
    config = Config(delta=DeltaConfig(targets=["^kernel"], budget=0.5, nonzeros=0))
    ranks = [setup.with_rank(config, params, moving, ["head/kernel"]).delta.rank for moving in ({}, params)]
    assert ranks == [7, 2]
