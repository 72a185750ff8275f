"""The examples for Linen models run, and print the numbers that an independent computation gives."""

import ast
import os
import pathlib
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def parameters(shapes, rank, nonzeros):
    return sum(rank * (rows + columns) + nonzeros for rows, columns in shapes)


@pytest.mark.slow
def test_a_linen_loop_learns_rings():
    """A classifier without an update is at chance, 1/3."""
    numbers = example("linen_loop")["main"]()
    assert numbers["accuracy"] > 0.8
    assert numbers["attached to materialized"] < 1e-3


@pytest.mark.slow
def test_flax_attention_learns():
    numbers = example("flax_attention")["main"]()
    assert numbers["after"] < 0.05 * numbers["before"]
    assert numbers["trained parameters"] == parameters([(32, 32)] * 4 + [(32, 1)], 1, 32)


@pytest.mark.slow
def test_many_adapters_in_one_batch_equal_each_alone():
    numbers = example("many_adapters")["main"]()
    assert numbers["users"] == 8
    assert numbers["parameters of one user"] == parameters([(64, 256), (256, 64)] * 3 + [(64, 10)], 4, 64)
    assert numbers["difference to each alone"] < 1e-4
    assert numbers["difference to the base"] > 0.1


@pytest.mark.slow
def test_the_ticket_of_learnt_coefficients_equals_the_masked_model():
    numbers = example("earlybert_coefficients")["main"]()
    assert numbers["neurons of the ticket"] == 2 * 64 - round(0.4 * 2 * 64)
    assert numbers["difference to the masked model"] < 1e-5


@pytest.mark.exhaustive
def test_a_step_on_a_mesh_equals_the_step_of_one_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # the example changes it
    done = subprocess.run([sys.executable, EXAMPLES / "mesh_step.py"], capture_output=True, text=True, check=True)
    numbers = ast.literal_eval(done.stdout)
    assert numbers["devices"] == 8
    assert numbers["difference"] < 1e-5
    model, x = example("mesh_step")["Model"](), jax.random.normal(jax.random.key(0), (64, 128))
    params = jax.device_get(model.init(jax.random.key(1), x)["params"])
    assert numbers["loss"] == pytest.approx(loss_by_hand(np.asarray(x), params), rel=1e-4)


def loss_by_hand(x, params):
    """Return the loss of the base model of the mesh, in NumPy."""

    def affine(number, x):
        return x @ params[f"Dense_{number}"]["kernel"] + params[f"Dense_{number}"]["bias"]

    labels = x[:, :16].argmax(-1)
    for number in (0, 2):
        hidden = affine(number + 1, x)
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + affine(number, hidden)
    logits = affine(4, x)
    return np.mean(np.log(np.exp(logits).sum(-1)) - logits[np.arange(64), labels])
