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

import dsee_jax
import runs
import tiny
from dsee_jax import __main__ as command
from dsee_jax import finished, loop, setup, statistics, step, tree
from dsee_jax.ckpt import hf
from dsee_jax.errors import InputError
from dsee_jax.layout import PLAIN
from dsee_jax.models import bert
from dsee_jax.models.layers import JointDense


def case(folder, *, labels=2, layers=1, family="bert"):
    """A model, its params, and a batch of four examples of two lengths, the last one a filler."""
    model, params = dsee_jax.load_pretrained(
        tiny.bert(folder, labels=labels, num_hidden_layers=layers, model_type=family), num_labels=labels
    )
    batch = tiny.batch(rows=4, length=10, types=model.config.type_vocab_size)
    batch["attention_mask"][2:] = batch["attention_mask"][:2]
    return model, params, batch | {"weights": np.array([1, 1, 1, 0], np.float32)}


def alone(batch, row):
    """One example of a batch without its padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: batch[name][row : row + 1, :length] for name in step.INPUTS}


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


def captured(model, params, example):
    """The inputs of every Dense and joint projection, as (tokens, in)."""
    seen = {}

    def intercept(call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, (nn.Dense, JointDense)):
            for name in getattr(module, "joint", ("",)):
                path = "/".join([*module.path, *([name] if name else []), "kernel"])
                seen[path] = np.asarray(args[0]).reshape(-1, args[0].shape[-1])
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        model.apply({"params": params}, **example, deterministic=True)
    return seen


def test_gram_is_numpy_over_the_inputs_of_examples_without_padding(tmp_path):
    """Padding and filler rows do not count; the last layer goes on with the first position of each example alone."""
    model, params, batch = case(tmp_path / "hf", layers=2)
    found = jax.jit(lambda p, b: statistics.gram(model, p, b))(params, batch)
    inputs = [captured(model, params, alone(batch, row)) for row in range(3)]
    kernels = [path for path in tree.flatten(params) if path.endswith("/kernel")]
    assert sorted(found) == sorted(kernels)
    for path, part in found.items():
        x = np.concatenate([seen[path] for seen in inputs]).astype(np.float64)
        assert int(part["count"]) == len(x)
        np.testing.assert_allclose(part["sum"], x.T @ x, rtol=1e-4, atol=1e-4, err_msg=path)
    tokens = int(batch["attention_mask"][:3].sum())
    assert int(found["encoder/layer_0/mlp/up/kernel"]["count"]) == tokens
    assert int(found["encoder/layer_1/mlp/up/kernel"]["count"]) == int(found["classifier/kernel"]["count"]) == 3


def test_gram_of_what_is_of_no_example(tmp_path):
    """Embeddings of distances count once a batch; kernels that share a tensor share its input, and so its matrix."""
    model, params, batch = case(tmp_path / "hf", family="deberta")
    found = statistics.gram(model, params, batch)
    rows = np.asarray(params["encoder"]["distance"]["embedding"], np.float64)
    for name in ("position_key", "position_query"):
        part = found[f"encoder/layer_0/attention/{name}/kernel"]
        assert int(part["count"]) == 10
        np.testing.assert_allclose(part["sum"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert hf.names(model).keys() >= found.keys()
    shared = {"encoder/layer_0/attention/query/kernel", "encoder/layer_0/attention/value/kernel"}
    one, other = (found[path] for path in shared)
    np.testing.assert_array_equal(one["sum"], other["sum"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run with updates."""
    folder = tmp_path_factory.mktemp("statistics")
    loop.run(runs.config(folder, train__epochs=1, train__retune_epochs=1), say=lambda text: None)
    return folder / "run"


def whole(run, count):
    """The folded model of a run and one batch of ``count`` training examples."""
    found = finished.opened(run, [f"data.examples={count}"])
    data = setup.read_data(found.config, found.task, run / "model", found.model)
    ((batch, _),) = statistics.eval_batches(data.train, count, data.edges)
    return found.model, finished.folded(found), batch


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
    part = statistics.gram(model, params, batch)["encoder/layer_0/attention/key/kernel"]
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
