"""Heads that not all models have: the bodies merge, and one model's head, class and labels are kept."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dsee_jax.errors import InputError
from merge import __main__ as command
from merge import pipeline

BODY = {
    "bert.embeddings.word_embeddings.weight": (9, 4),
    "bert.encoder.layer.0.dense.weight": (4, 4),
    "bert.pooler.dense.weight": (4, 4),
}
MLM = {"cls.predictions.bias": (9,), "cls.predictions.transform.dense.weight": (4, 4)}
RECIPE = """
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1}
models: [{model: one}, {model: two}]
"""


def write(folder, shapes, architecture, labels=0):
    """Write a model of random weights."""
    folder.mkdir()
    normal = np.random.default_rng(labels).normal
    tensors = {name: normal(size=shape).astype("float32") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    fields = {"model_type": "b", "architectures": [architecture], "vocab_size": 9}
    if labels:
        fields |= {"id2label": {str(label): f"{folder.name}{label}" for label in range(labels)}, "problem_type": "x"}
    (folder / "config.json").write_text(json.dumps(fields))


def classifier(labels):
    return {"classifier.weight": (labels, 4), "classifier.bias": (labels,)}


@pytest.fixture
def family(tmp_path):
    """A masked language model, and two classifiers with other numbers of labels."""
    write(tmp_path / "base", BODY | MLM, "BForMaskedLM")
    for name, labels in (("one", 2), ("two", 3)):
        write(tmp_path / name, BODY | classifier(labels), "BForSequenceClassification", labels)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(
    ("head", "names", "labels", "architecture"),
    [
        (None, classifier(2), 2, "BForSequenceClassification"),
        ("first", classifier(2), 2, "BForSequenceClassification"),
        ("two", classifier(3), 3, "BForSequenceClassification"),
        ("base", MLM, 0, "BForMaskedLM"),
        ("drop", {}, 0, "BModel"),
    ],
)
def test_result_has_the_head_class_and_labels_of_one_model(family, head, names, labels, architecture):
    ready = pipeline.read(family / "recipe.yml", head=head)
    jobs = {job.name: job for job in ready.plan.jobs}
    assert {name: job.shape for name, job in jobs.items()} == BODY | names
    assert {name for name, job in jobs.items() if job.method == "copy"} == names.keys()
    assert ready.config["architectures"] == [architecture]
    assert len(ready.config.get("id2label", ())) == labels
    assert ("problem_type" in ready.config) == bool(labels)
    assert len(ready.plan.warnings) == 1


def test_written_head_is_the_kept_models(family, capsys):
    """In the written type; the screen says what became of the heads."""
    (family / "recipe.yml").write_text(f"{RECIPE}dtype: bfloat16\n")
    assert command.main([str(family / "recipe.yml"), str(family / "out"), "--heads", "two"]) == 0
    ready = pipeline.read(family / "recipe.yml", head="two")
    job = next(job for job in ready.plan.jobs if job.name == "classifier.weight")
    assert job.dtype == "BF16"
    from dsee_jax.ckpt import tensors

    written, source = (tensors.index(family / name)["classifier.weight"] for name in ("out", "two"))
    np.testing.assert_array_equal(tensors.read(written), tensors.read(source).astype(tensors.DTYPES["BF16"]))
    assert "classifier copied from two; cls left out (--heads chooses another)" in capsys.readouterr().err


def test_pooler_of_one_side_is_kept(family):
    """Models of one class too."""
    (family / "recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}"
    )
    write(family / "a", {name: shape for name, shape in BODY.items() if "pooler" not in name}, "BModel")
    write(family / "b", BODY, "BModel")
    ready = pipeline.read(family / "recipe.yml")
    assert {job.name for job in ready.plan.jobs if job.method == "copy"} == {"bert.pooler.dense.weight"}
    assert ready.config["architectures"] == ["BModel"]
    (warning,) = ready.plan.warnings
    assert "bert.pooler copied from b (--heads" in warning


def test_tied_head_counts_as_a_head(family):
    """A tied decoder stores none; the result is a decoder, without the other's head and pooler."""
    (family / "recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: a}, {model: one}]\nparameters: {weight: 1}"
    )
    write(family / "a", {name: shape for name, shape in BODY.items() if "pooler" not in name}, "BForCausalLM")
    ready = pipeline.read(family / "recipe.yml")
    assert {job.name for job in ready.plan.jobs} == {name for name in BODY if "pooler" not in name}
    assert ready.config["architectures"] == ["BForCausalLM"]


def relabelled(folder, names):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": dict(enumerate(names))}))


def test_equal_heads_are_merged_only_with_equal_labels(family):
    """Rows of one shape may stand for other classes; LABEL_0 says nothing."""
    (family / "recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: one}, {model: twin}]\nparameters: {weight: 1}"
    )
    write(family / "twin", BODY | classifier(2), "BForSequenceClassification", 2)
    for names in (["no", "yes"], ["NO", "Yes"], ["LABEL_0", "LABEL_1"]):
        relabelled(family / "one", ["no", "yes"])
        relabelled(family / "twin", names)
        ready = pipeline.read(family / "recipe.yml")
        assert all(job.method == "linear" for job in ready.plan.jobs)
        assert ready.plan.warnings == ()
    relabelled(family / "twin", ["yes", "no"])
    for choice, labels, owner in (
        (None, ["no", "yes"], "one"),
        ("twin", ["yes", "no"], "twin"),
        ("drop", None, "left out"),
    ):
        ready = pipeline.read(family / "recipe.yml", head=choice)
        methods = {job.name: job.method for job in ready.plan.jobs}
        assert methods.get("classifier.weight") == (None if choice == "drop" else "copy")
        assert list((ready.config.get("id2label") or {}).values()) == (labels or ["no", "yes"])
        assert owner in ready.plan.warnings[0]


def test_missing_body_is_no_head(family):
    """Nor is a head that a model lacks whose class has it, unless the command says so."""
    (family / "recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: one}, {model: less}]\nparameters: {weight: 1}"
    )
    write(family / "less", BODY, "BForSequenceClassification", 2)
    with pytest.raises(InputError, match="less lacks the tensor 'classifier.*--heads one"):
        pipeline.read(family / "recipe.yml")
    assert len(pipeline.read(family / "recipe.yml", head="one").plan.jobs) == 5
    with pytest.raises(InputError, match="--heads is 'ones' .did you mean 'one'"):
        pipeline.read(family / "recipe.yml", head="ones")
    save_file({"classifier.weight": np.zeros((2, 4), "float32")}, family / "less" / "model.safetensors")
    with pytest.raises(InputError, match="less lacks the tensor"):
        pipeline.read(family / "recipe.yml", head="one")
