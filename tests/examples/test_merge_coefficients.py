"""The example that learns merge coefficients: its losses against NumPy, from the coefficients that it returns."""

import importlib.util
import pathlib

import numpy as np
import pytest

FILE = pathlib.Path(__file__).parents[2] / "examples" / "merge_coefficients.py"


def cross_entropy(params, images, labels):
    for number in (0, 2, 4, 6):
        images = images @ params[f"layers_{number}"]["kernel"] + params[f"layers_{number}"]["bias"]
        images = np.maximum(images, 0) if number < 6 else images
    return np.mean(np.log(np.exp(images).sum(-1)) - images[np.arange(len(labels)), labels])


@pytest.mark.slow
def test_learnt_coefficients_give_no_lower_loss(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("merge_coefficients", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    models = example.train()
    monkeypatch.setattr(example, "train", lambda: models)
    before, after, coefficients = example.main()
    assert after < 0.9 * before
    assert f"{after:.3f} with these" in capsys.readouterr().out
    _, (a, b), images, labels = models
    merged = {}
    for number in ("0", "2", "4", "6"):
        share = np.asarray(coefficients[number], np.float64)
        np.testing.assert_allclose(share.sum(), 1, rtol=1e-6)
        layer = f"layers_{number}"
        merged[layer] = {
            key: share[0] * np.asarray(a[layer][key]) + share[1] * np.asarray(b[layer][key]) for key in a[layer]
        }
    np.testing.assert_allclose(after, cross_entropy(merged, images.astype(np.float64), labels), rtol=1e-5)
