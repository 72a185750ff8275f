"""The example of an Equinox model: its loss against NumPy, from the pruned weights and the updates that it returns."""

import importlib.util
import pathlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from dsee_jax import tree

FILE = pathlib.Path(__file__).parents[2] / "examples" / "equinox_module.py"


@pytest.mark.slow
def test_loss_is_another_one_than_that_of_pruned_weights_plus_updates(capsys):
    pytest.importorskip("equinox")
    spec = importlib.util.spec_from_file_location("equinox_module", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after, model, adapter = example.main()
    assert after < 0.2 * before
    assert f"{after:.3f} tuned" in capsys.readouterr().out

    images, labels = load_digits(return_X_y=True)
    x = images.reshape(-1, 8, 8).swapaxes(1, 2).reshape(-1, 64) / 16
    for number, layer in enumerate(model.layers):
        w = np.asarray(layer.weight, np.float64)
        if number < 2:
            # Two of each four inputs of an output.
            assert set((w.reshape(len(w), -1, 4) == 0).sum(-1).flat) == {2}
            delta = tree.get(adapter.deltas, f"layers/{number}/weight")
            update = np.asarray(delta["a"], np.float64) @ np.asarray(delta["b"], np.float64)
            support = np.asarray(tree.get(adapter.supports, f"layers/{number}/weight"))
            np.add.at(update, tuple(support.T), np.asarray(delta["values"]))
            w = w + example.CONFIG.alpha / example.CONFIG.rank * update.T
        x = x @ w.T + np.asarray(layer.bias)
        x = np.maximum(x, 0) if number < 2 else x
    np.testing.assert_allclose(after, np.mean(np.log(np.exp(x).sum(-1)) - x[np.arange(len(labels)), labels]), rtol=1e-4)
