"""The example that prunes along a schedule: its zeros and its loss against NumPy."""

import importlib.util
import pathlib

import numpy as np
import pytest

FILE = pathlib.Path(__file__).parents[2] / "examples" / "pruning_schedule.py"


@pytest.mark.slow
def test_pruned_network_has_the_zeros_of_its_schedule(capsys):
    spec = importlib.util.spec_from_file_location("pruning_schedule", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    sparsity, loss, params = example.main()
    hidden = [np.asarray(params[f"layers_{number}"]["kernel"]) for number in (0, 2)]
    zeros = sum(np.count_nonzero(w == 0) for w in hidden)
    assert zeros == round(0.8 * (8 * 64 + 64 * 64)) == round(sparsity * (8 * 64 + 64 * 64))
    assert np.count_nonzero(np.asarray(params["layers_4"]["kernel"]) == 0) == 0
    assert loss < 0.1
    assert f"sparsity {sparsity:.4f}, loss {loss:.4f}" in capsys.readouterr().out
