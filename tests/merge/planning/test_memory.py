"""The merge of a plan as one program of accelerators: it is what is merged from files to files, and its memory is known."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import checkpoints
import merge
from merge import __main__ as command
from merge import pipeline
from merge.methods import METHODS
from merge.planning import memory

METHODS_HERE = ["linear", "rankmean", "task_arithmetic", "ties", "dare_ties", "model_stock", "sce", "slerp"]


def ready(folder, method):
    count = 1 if method == "slerp" else 2
    base, *models = checkpoints.family(folder, models=count)
    each = {key: {"weight": 0.6, "density": 0.5}[key] for key in METHODS[method].each if key in ("weight", "density")}
    shared = {"t": 0.3} if method == "slerp" else {}
    path = checkpoints.recipe(folder, method, models=count, each=each, parameters=shared)
    return path, base, models, merge.merge(base, models, method=method, **each, **shared)


@pytest.mark.parametrize("method", METHODS_HERE)
def test_the_program_merges(tmp_path, method):
    """What is compiled ahead of time is the merge itself."""
    path, base, _, expected = ready(tmp_path, method)
    plan = pipeline.read(path).plan
    origin, others = {}, {}
    for job in plan.jobs:
        first, *rest = [lazy.read(0, int(np.prod(lazy.shape))).reshape(lazy.shape) for lazy in job.inputs]
        origin[job.name], others[job.name] = first, {"models": tuple(rest), "statistics": ()}
    found = jax.jit(memory.program(plan))(origin, others)
    assert found.keys() == expected.keys() == base.keys()
    for name, value in found.items():
        assert value.dtype == base[name].dtype
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6)


def arguments(recipe, folder):
    """Of a plan for the devices here."""
    return [str(recipe), str(folder / "out"), "--plan", "--topology", "here", "--json", str(folder / "plan.json")]


def test_what_it_takes(tmp_path, capsys):
    """The arguments are the models, as many bytes as their files hold; the result takes the place of the base."""
    path, base, models, _ = ready(tmp_path, "ties")
    assert command.main(arguments(path, tmp_path)) == 0
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["bytes_per_chip"]["arguments"] == sum(
        leaf.nbytes for tree in (base, *models) for leaf in tree.values()
    )
    assert found["bytes_per_chip"]["results"] < 1000
    assert found["collectives"] == []
    assert "the merge, all models in memory" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_on_eight_devices(tmp_path):
    """Each holds its eighth of what eight divides; RankMean's norms, and nothing of a tensor's size, are summed over them."""
    path, base, models, _ = ready(tmp_path, "rankmean")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run(
        [sys.executable, "-m", "merge", *arguments(path, tmp_path)],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    found = json.loads((tmp_path / "plan.json").read_text())
    share = sum(leaf.nbytes // (8 if any(size % 8 == 0 for size in leaf.shape) else 1) for leaf in base.values())
    assert found["devices"] == 8
    # Of what is in no layer the base is not looked at.
    assert share * len(models) < found["bytes_per_chip"]["arguments"] < share * (1 + len(models))
    assert {row["kind"] for row in found["collectives"]} == {"all-reduce"}
    assert max(row["bytes"] / row["count"] for row in found["collectives"]) < min(leaf.nbytes for leaf in base.values())


def test_tensors_are_divided_along_their_longest_axis_that_can_be():
    assert memory._divided((6, 8), 4) == PartitionSpec(None, ("data", "fsdp", "tensor"))
    assert memory._divided((16, 8), 4) == PartitionSpec(("data", "fsdp", "tensor"), None)
    assert memory._divided((6, 7), 4) == PartitionSpec()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v5e:2x2"], "--topology belongs to a plan: give --plan --topology too"),
        (["--plan", "--json", "x"], "--json belongs to a plan"),
        (["--plan", "--topology", "v5:2x2"], "no such chip"),
    ],
)
def test_bad_input(tmp_path, capsys, options, message):
    path, *_ = ready(tmp_path, "linear")
    assert command.main([str(path), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
