"""The example of an NNX model: its loss against NumPy, from the frozen weights and the updates that it returns."""

import importlib.util
import pathlib

import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import dsee_jax
from dsee_jax import tree

FILE = pathlib.Path(__file__).parents[2] / "examples" / "nnx_module.py"


def softmax(x):
    exponentials = np.exp(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def read(params, images):
    """The logits of the model of the example."""
    project = lambda name: (
        np.einsum("bti,iho->btho", images, params[f"attention/{name}/kernel"]) + params[f"attention/{name}/bias"]
    )
    query, key, value = map(project, ("query", "key", "value"))
    weights = softmax(np.einsum("btho,bsho->bhts", query, key) / np.sqrt(query.shape[-1]))
    mixed = np.einsum("bhts,bsho->btho", weights, value)
    x = images + np.einsum("btho,hoi->bti", mixed, params["attention/out/kernel"]) + params["attention/out/bias"]
    x = np.maximum(x.reshape(len(x), -1) @ params["hidden/kernel"] + params["hidden/bias"], 0)
    return x @ params["head/kernel"] + params["head/bias"]


@pytest.mark.slow
def test_loss_is_another_one_than_that_of_frozen_weights_plus_updates(capsys):
    spec = importlib.util.spec_from_file_location("nnx_module", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after, tuned, plain = example.main()
    assert after < 0.1 * before
    assert f"{after:.3f} tuned" in capsys.readouterr().out

    params = {path: np.asarray(w, np.float64) for path, w in tree.flatten(nnx.state(tuned, nnx.Param)).items()}
    assert np.mean(params["hidden/kernel"] == 0) == 0.5
    adapter = dsee_jax.nnx.adapter(tuned)
    for path in ("attention/query/kernel", "attention/value/kernel", "hidden/kernel", "head/kernel"):
        delta, support = tree.get(adapter.deltas, path), tree.get(adapter.supports, path)
        update = np.asarray(delta["a"], np.float64) @ np.asarray(delta["b"], np.float64)
        np.add.at(update, tuple(np.asarray(support).T), np.asarray(delta["values"]))
        params[path] += example.CONFIG.alpha / example.CONFIG.rank * update.reshape(params[path].shape)
    for path, w in tree.flatten(nnx.state(plain)).items():
        np.testing.assert_allclose(w, params[path], atol=1e-5)

    images, labels = load_digits(return_X_y=True)
    probabilities = softmax(read(params, images.reshape(-1, 8, 8).swapaxes(1, 2) / 16))
    np.testing.assert_allclose(after, -np.log(probabilities[np.arange(len(labels)), labels]).mean(), rtol=1e-4)
