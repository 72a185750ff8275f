"""The recommended recipes train on every task of GLUE, as its files are published."""

import json
import pathlib

import pytest

import glue_files
import tiny
from dsee_jax.ckpt import folders
from dsee_jax.metrics import classification
from dsee_jax.train import config_file, loop

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RECIPES = ("dsee", "cut", "lora")
SMALL = {
    **{"data.max_length": 16, "delta.rank": 1, "delta.nonzeros": 4, "train.batch_size": 8},
    **{"train.least_steps": 0, "train.most_steps": 5},
}
"""The settings of a recipe that a tiny model and a few examples need."""


def cases():
    """Yield every task with a recipe: that in the slow tier has three classes and two dev sets; all share code."""
    for number, task in enumerate(sorted(glue_files.FILES)):
        tier = pytest.mark.slow if task == "mnli" else pytest.mark.exhaustive
        yield pytest.param(task, RECIPES[number % len(RECIPES)], marks=tier)


@pytest.mark.parametrize(("task", "recipe"), [*cases()])
def test_recipe_trains_on_every_task(tmp_path, task, recipe):
    tiny.bert(tmp_path / "base", num_hidden_layers=1, head=False)
    glue_files.published(tmp_path / "glue", task, train=24, dev=10)
    keys = {"model.path": tmp_path / "base", "data.task": task, "data.dir": tmp_path / "glue", **SMALL}
    config = config_file.read(
        CONFIGS / f"recommended_{recipe}.yaml",
        [f"{key}={value}" for key, value in keys.items()] + [f"output_dir={tmp_path / 'run'}"],
    )
    results = loop.run(config, say=lambda text: None)
    names = {*classification.of_task(task, regression=task == "stsb"), "loss"}
    names |= {f"{name}_dev_mismatched" for name in names if task == "mnli"}
    assert results["final"].keys() == names
    steps = [(stage["steps"], stage["evaluations"]) for stage in results["stages"] if "steps" in stage]
    assert steps == ([(5, 4)] if recipe == "lora" else [(2, 2), (3, 3)])
    fields = json.loads((tmp_path / "run" / folders.MODEL / folders.MODEL_CONFIG).read_text())
    assert len(fields["id2label"]) == {"stsb": 1, "mnli": 3}.get(task, 2)
    assert results["weight_sparsity"] == pytest.approx(0.7, abs=1e-3) or recipe != "dsee"
    assert results["flops_ratio"] <= 0.5 or recipe != "cut"
