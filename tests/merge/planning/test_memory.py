"""The plan's merge as one accelerator program: its result, its memory, and its collectives."""

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

METHODS_TESTED = ["linear", "rankmean", "task_arithmetic", "ties", "dare_ties", "model_stock", "sce", "slerp"]


def family(folder, method):
    """Write a base, models and a recipe; return the recipe's path, the trees, and the expected merge."""
    count = 1 if method == "slerp" else 2
    base, *models = checkpoints.family(folder, models=count)
    each = {key: {"weight": 0.6, "density": 0.5}[key] for key in METHODS[method].each if key in ("weight", "density")}
    shared = {"t": 0.3} if method == "slerp" else {}
    path = checkpoints.recipe(folder, method, models=count, each=each, parameters=shared)
    return path, base, models, merge.merge(base, models, method=method, **each, **shared)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS_TESTED)
def test_program_equals_the_merge_in_memory(tmp_path, method):
    """The program that is compiled ahead of time merges the tensors of the plan."""
    path, base, _, expected = family(tmp_path, method)
    plan = pipeline.read(path).plan
    origin, others = {}, {}
    for job in plan.jobs:
        first, *rest = [lazy.read(0, int(np.prod(lazy.shape))).reshape(lazy.shape) for lazy in job.inputs]
        origin[job.name], others[job.name] = first, {"models": tuple(rest), "statistics": ()}
    merged = jax.jit(memory.program(plan))(origin, others)
    assert merged.keys() == expected.keys() == base.keys()
    for name, value in merged.items():
        assert value.dtype == base[name].dtype
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6)


def arguments(recipe, folder):
    """The command line of a plan for the local devices."""
    return [str(recipe), str(folder / "out"), "--plan", "--topology", "here", "--json", str(folder / "plan.json")]


def test_argument_bytes_are_the_bytes_of_the_models(tmp_path, capsys):
    """The results need almost no memory: the merged tensors reuse the base's buffers."""
    path, base, models, _ = family(tmp_path, "ties")
    assert command.main(arguments(path, tmp_path)) == 0
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["bytes_per_chip"]["arguments"] == sum(
        leaf.nbytes for tree in (base, *models) for leaf in tree.values()
    )
    assert figures["bytes_per_chip"]["results"] < 1000
    assert figures["collectives"] == []
    assert "the merge, all models in memory" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_eight_devices_hold_one_eighth_each(tmp_path):
    """Tensors without an axis divisible by eight are replicated; only RankMean's norms are all-reduced."""
    path, base, models, _ = family(tmp_path, "rankmean")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    subprocess.run(
        [sys.executable, "-m", "merge", *arguments(path, tmp_path)],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    figures = json.loads((tmp_path / "plan.json").read_text())
    share = sum(leaf.nbytes // (8 if any(size % 8 == 0 for size in leaf.shape) else 1) for leaf in base.values())
    assert figures["devices"] == 8
    # RankMean does not read the base's tensors outside the layers.
    assert share * len(models) < figures["bytes_per_chip"]["arguments"] < share * (1 + len(models))
    assert {row["kind"] for row in figures["collectives"]} == {"all-reduce"}
    assert max(row["bytes"] / row["count"] for row in figures["collectives"]) < min(
        leaf.nbytes for leaf in base.values()
    )


def test_longest_divisible_axis_is_sharded():
    assert memory._partition_spec((6, 8), 4) == PartitionSpec(None, ("data", "fsdp", "tensor"))
    assert memory._partition_spec((16, 8), 4) == PartitionSpec(("data", "fsdp", "tensor"), None)
    assert memory._partition_spec((6, 7), 4) == PartitionSpec()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topology", "v5e:2x2"], "--topology belongs to a plan: give --plan too"),
        (["--json"], "--json belongs to a plan: give --plan too"),
        (["--plan", "--topology", "v5:2x2"], "unknown chip"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, options, message):
    path, *_ = family(tmp_path, "linear")
    assert command.main([str(path), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
