"""Fisher information and Gram matrices next to plain loops, and the files they are written to."""

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
from dsee_jax import tree
from dsee_jax.analysis import statistics
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import PLAIN
from dsee_jax.models import bert
from dsee_jax.prune import calibration
from dsee_jax.train import inputs, reopen
from examples import alone, case


@pytest.mark.parametrize("labels", [3, 1])
def test_fisher_is_a_loop_over_examples_and_classes(tmp_path, labels):
    """One gradient of one log-probability at a time, squared, weighted by the probability, added; padding never seen."""
    model, params, batch = case(tmp_path / "hf", labels=labels)
    regression = labels == 1

    def score(params, example, label):
        logits = model.apply({"params": params}, **example, deterministic=True)[0]
        return logits[0] if regression else jax.nn.log_softmax(logits)[label]

    gradient = jax.jit(jax.value_and_grad(score))
    wanted = jax.tree.map(np.zeros_like, params)
    for row in range(3):
        for label in range(labels):
            value, found = gradient(params, alone(batch, row), label)
            share = 1.0 if regression else np.exp(value)
            wanted = jax.tree.map(lambda total, g, share=share: total + share * np.square(g), wanted, found)
    found = jax.jit(lambda p, b: statistics.fisher(model, p, b, regression=regression))(params, batch)
    # Relative to the largest of all: softmax does not see the bias of the keys, whose gradient is rounding.
    largest = max(float(value.max()) for value in jax.tree.leaves(wanted))
    for path, value in tree.flatten(found).items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, tree.get(wanted, path), rtol=1e-3, atol=1e-8 * largest, err_msg=path)


def test_fisher_of_a_softmax_is_known():
    """A bias alone on the logits: F = p (1 - p)."""

    class Bias(nn.Module):
        @nn.compact
        def __call__(self, input_ids, attention_mask, token_type_ids, deterministic):
            return self.param("bias", nn.initializers.zeros, (3,))[None] + jnp.zeros((input_ids.shape[0], 1))

    bias = np.log(np.array([0.2, 0.3, 0.5], np.float32))
    batch = tiny.batch(rows=2) | {"weights": np.ones(2, np.float32)}
    found = statistics.fisher(Bias(), {"bias": bias}, batch, regression=False)
    np.testing.assert_allclose(found["bias"], 2 * np.array([0.16, 0.21, 0.25]), rtol=1e-5)


@pytest.fixture(scope="module")
def run(finished_run):
    """The folder of a finished run with updates."""
    return finished_run("dsee") / "run"


def whole(run, count):
    """The folded model of a run and one batch of ``count`` training examples."""
    found = reopen.opened(run, [f"data.examples={count}"])
    data = inputs.read_data(found.config, found.task, run / "model", found.model)
    ((batch, _),) = statistics.eval_batches(data.train, count, data.edges)
    return found.model, reopen.folded(found), batch


def test_the_file_of_fisher_has_the_exported_models_names_and_shapes(run, tmp_path, capsys):
    out = tmp_path / "fisher.safetensors"
    assert command.main(["statistics", str(run), str(out), "--kind", "fisher", "--examples", "6"]) == 0
    assert "fisher of 6 examples of tiny" in capsys.readouterr().out
    with safe_open(out, "numpy") as file:
        assert file.metadata() == {"kind": "fisher", "examples": "6", "task": "tiny"}
    found, exported = load_file(out), load_file(run / "model" / "model.safetensors")
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in exported.items()}
    model, params, batch = whole(run, 6)
    mean = statistics.fisher(model, params, batch, regression=False)["encoder"]["layer_0"]["mlp"]["up"]["kernel"] / 6
    theirs = found["bert.encoder.layer.0.intermediate.dense.weight"]
    np.testing.assert_allclose(theirs.T, mean, rtol=1e-3, atol=1e-6 * float(mean.max()))


def test_the_file_of_gram_has_a_matrix_for_each_kernel(run, tmp_path):
    out = tmp_path / "gram.safetensors"
    assert command.main(["statistics", str(run), str(out), "--kind", "gram", "--examples", "0"]) == 0
    found, exported = load_file(out), load_file(run / "model" / "model.safetensors")
    matrices = {n for n, x in exported.items() if x.ndim == 2 and "embeddings" not in n}
    assert {name: x.shape for name, x in found.items()} == {name: (exported[name].shape[1],) * 2 for name in matrices}
    model, params, batch = whole(run, 40)
    part = calibration.gram(model, params, batch)["encoder/layer_0/attention/key/kernel"]
    theirs = found["bert.encoder.layer.0.attention.self.key.weight"]
    np.testing.assert_allclose(theirs, part["sum"] / part["count"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(theirs, found["bert.encoder.layer.0.attention.self.value.weight"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("out.npz", [], "end it in .safetensors"),
        ("nowhere/out.safetensors", [], "there is no folder"),
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


def test_gram_of_kernels_stored_as_they_are_here_is_refused(run, monkeypatch):
    """Merging would take their rows for outputs."""
    rows = [(ours, theirs, PLAIN if ours == "pooler/kernel" else layout) for ours, theirs, layout in bert.HF_NAMES]
    monkeypatch.setattr(bert, "HF_NAMES", rows)
    with pytest.raises(InputError, match=r"'bert.pooler.dense.weight' is stored \(in, out\); .* use --kind fisher"):
        statistics.collect(run, "gram", examples=0)


def test_a_folder_that_is_no_run(tmp_path, run, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("metrics.json", "checkpoints"))
    assert command.main(["statistics", str(copy), str(tmp_path / "o.safetensors"), "--kind", "gram"]) == 2
    assert "is no finished run" in capsys.readouterr().err
    assert json.loads((run / "metrics.json").read_text())["task"] == "tiny"
