"""Fisher information and Gram matrices against plain loops, and their files."""

import dataclasses
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import tiny
from dsee_jax import __main__ as command
from dsee_jax import models, tree
from dsee_jax.analysis import statistics
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import PLAIN
from dsee_jax.models import bert
from dsee_jax.prune import calibration
from dsee_jax.train import finished_run, inputs
from examples import alone, case


@pytest.mark.parametrize("labels", [3, 1])
def test_fisher_is_a_loop_over_examples_and_classes(tmp_path, labels):
    """One gradient of one log-probability at a time, squared, weighted by the probability, summed; without any padding."""
    model, params, batch = case(tmp_path / "hf", labels=labels)
    regression = labels == 1

    def score(params, example, label):
        logits = model.apply({"params": params}, **example, deterministic=True)[0]
        return logits[0] if regression else jax.nn.log_softmax(logits)[label]

    gradient = jax.jit(jax.value_and_grad(score))
    expected = jax.tree.map(np.zeros_like, params)
    for row in range(3):
        for label in range(labels):
            value, slope = gradient(params, alone(batch, row), label)
            share = 1.0 if regression else np.exp(value)
            expected = jax.tree.map(lambda total, g, share=share: total + share * np.square(g), expected, slope)
    information = jax.jit(lambda p, b: statistics.fisher(model, p, b, regression=regression))(params, batch)
    # Relative to the largest value: the gradient of the bias of the keys is rounding error, since softmax ignores the bias.
    largest = max(float(value.max()) for value in jax.tree.leaves(expected))
    for path, value in tree.flatten(information).items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, tree.get(expected, path), rtol=1e-3, atol=1e-8 * largest, err_msg=path)


def test_fisher_of_a_softmax():
    """A model of one bias per logit: F = p (1 - p)."""

    class Bias(nn.Module):
        @nn.compact
        def __call__(self, input_ids, attention_mask, token_type_ids, deterministic):
            return self.param("bias", nn.initializers.zeros, (3,))[None] + jnp.zeros((input_ids.shape[0], 1))

    bias = np.log(np.array([0.2, 0.3, 0.5], np.float32))
    batch = tiny.batch(rows=2) | {"weights": np.ones(2, np.float32)}
    information = statistics.fisher(Bias(), {"bias": bias}, batch, regression=False)
    np.testing.assert_allclose(information["bias"], 2 * np.array([0.16, 0.21, 0.25]), rtol=1e-5)


@pytest.fixture(scope="module")
def run(finished_run):
    """The folder of a finished run with updates."""
    return finished_run("dsee") / "run"


def reopened(run, count):
    """The folded model of a run and one batch of ``count`` training examples."""
    finished = finished_run.load(run, [f"data.examples={count}"])
    data = inputs.read_data(finished.config, finished.task, run / "model", finished.model)
    ((batch, _),) = statistics.eval_batches(data.train, count, data.edges)
    return finished.model, finished_run.plain_params(finished), batch


def test_fisher_file_has_the_names_and_shapes_of_the_exported_model(run, tmp_path, capsys):
    out = tmp_path / "fisher.safetensors"
    assert command.main(["statistics", str(run), str(out), "--kind", "fisher", "--examples", "6"]) == 0
    assert "fisher of 6 examples of tiny" in capsys.readouterr().out
    with safe_open(out, "numpy") as file:
        assert file.metadata() == {"kind": "fisher", "examples": "6", "task": "tiny"}
    saved, exported = load_file(out), load_file(run / "model" / "model.safetensors")
    assert {name: x.shape for name, x in saved.items()} == {name: x.shape for name, x in exported.items()}
    model, params, batch = reopened(run, 6)
    mean = statistics.fisher(model, params, batch, regression=False)["encoder"]["layer_0"]["mlp"]["up"]["kernel"] / 6
    stored = saved["bert.encoder.layer.0.intermediate.dense.weight"]
    np.testing.assert_allclose(stored.T, mean, rtol=1e-3, atol=1e-6 * float(mean.max()))


def test_gram_file_has_one_matrix_per_kernel(run, tmp_path):
    out = tmp_path / "gram.safetensors"
    assert command.main(["statistics", str(run), str(out), "--kind", "gram", "--examples", "0"]) == 0
    saved, exported = load_file(out), load_file(run / "model" / "model.safetensors")
    matrices = {n for n, x in exported.items() if x.ndim == 2 and "embeddings" not in n}
    assert {name: x.shape for name, x in saved.items()} == {name: (exported[name].shape[1],) * 2 for name in matrices}
    model, params, batch = reopened(run, 40)
    part = calibration.gram(model, params, batch)["encoder/layer_0/attention/key/kernel"]
    stored = saved["bert.encoder.layer.0.attention.self.key.weight"]
    np.testing.assert_allclose(stored, part["sum"] / part["count"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stored, saved["bert.encoder.layer.0.attention.self.value.weight"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("out.npz", [], "end it in .safetensors"),
        ("nowhere/out.safetensors", [], "does not exist; create it first"),
        ("there.safetensors", [], "exists"),
        ("out.safetensors", ["--examples", "41"], "data.examples: 41 of 40"),
        ("out.safetensors", ["--data.dir=/nowhere"], "/nowhere"),
        ("out.safetensors", ["--exampels=3"], "exampels"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, capsys, name, options, message):
    (tmp_path / "there.safetensors").write_bytes(b"")
    assert command.main(["statistics", str(run), str(tmp_path / name), "--kind", "gram", *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


def test_gram_of_untransposed_kernels_is_refused(run, monkeypatch):
    """Merging would read the inputs of such kernels as outputs."""
    names = bert.ARCHITECTURE.hf_names
    names = tuple((path, name, PLAIN if path == "pooler/kernel" else layout) for path, name, layout in names)
    monkeypatch.setitem(models.MODELS, "bert", dataclasses.replace(bert.ARCHITECTURE, hf_names=names))
    with pytest.raises(InputError, match=r"'bert.pooler.dense.weight' is stored \(in, out\); .* use --kind fisher"):
        statistics.collect(run, "gram", examples=0)


def test_unfinished_run_is_refused(tmp_path, run, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("metrics.json", "checkpoints"))
    assert command.main(["statistics", str(copy), str(tmp_path / "o.safetensors"), "--kind", "gram"]) == 2
    assert "is no finished run" in capsys.readouterr().err
    assert json.loads((run / "metrics.json").read_text())["task"] == "tiny"
