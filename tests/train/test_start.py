"""Runs that start from the adapter of an earlier run (``delta.start``)."""

import re
import shutil

import jax
import numpy as np
import pytest

import runs
from dsee_jax import tree
from dsee_jax.ckpt import adapter
from dsee_jax.deltas.adapter import kernels
from dsee_jax.errors import InputError
from dsee_jax.plan import run as plan
from dsee_jax.train import setup

UP = "encoder/layer_0/mlp/up/kernel"


@pytest.fixture
def cut(tmp_path, finished_run):
    """Return the folder of a structured run, and a function of overrides to the config of a run that starts from it."""
    shutil.copytree(finished_run("structured"), tmp_path, dirs_exist_ok=True)
    options = {key: value for key, value in runs.FINISHED["structured"].items() if key.startswith("delta")}
    options |= {"prune__kind": "none", "output_dir": str(tmp_path / "new")}
    options |= {"model__path": str(tmp_path / "run/model"), "delta__start": str(tmp_path / "run/adapter")}
    return tmp_path / "run", lambda **overrides: runs.config(tmp_path, **options | overrides)


def change(folder, drop, **delta):
    """Write the adapter of a run without the updates whose paths a regex matches, and with other keys of its run."""
    saved = adapter.load(folder / "adapter")
    deltas, supports = (
        tree.unflatten({path: leaf for path, leaf in tree.flatten(part).items() if not re.fullmatch(drop, path)})
        for part in (saved.deltas, saved.supports)
    )
    config = saved.config | {"delta": saved.config["delta"] | delta}
    adapter.save(folder / "adapter", saved._replace(deltas=deltas, supports=supports, config=config))


def assert_starts_from(begun, folder):
    saved = adapter.load(folder / "adapter")
    for found, expected in ((begun.trained["deltas"], saved.deltas), (begun.supports, saved.supports)):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_run_starts_from_the_values_that_a_cut_left(cut):
    """The cut took a number of values of its own from each kernel."""
    folder, config = cut
    left = {delta["values"].size for delta in kernels(adapter.load(folder / "adapter").deltas).values()}
    assert len(left) > 1
    begun = setup.prepare(config())
    assert_starts_from(begun, folder)
    assert plan.plan(config())["trained"] == sum(leaf.size for leaf in jax.tree.leaves(begun.trained))


@pytest.mark.parametrize("rank", [2, 0])
def test_run_starts_without_the_values_of_a_kernel_that_the_cut_emptied(cut, rank):
    """Without a low-rank part there is no update of the kernel left. 1000 values are more than a kernel has entries."""
    folder, config = cut
    change(folder, f"{UP}(/values)?" if rank else f"{UP}(/values)?|.*/[ab]", nonzeros=1000, rank=rank)
    begun = setup.prepare(config(delta__nonzeros=1000, delta__rank=rank, delta__alpha=16 * (rank or 1)))
    assert UP not in tree.flatten(begun.supports)
    assert_starts_from(begun, folder)


OTHERS = {
    "fewer values": (
        "",
        {},
        {"delta__nonzeros": 6},
        r"values' has the shape \(\d,\) in the adapter and \(6,\) by this",
    ),
    "more values": ("", {"nonzeros": 1}, {"delta__nonzeros": 1}, r"values' has the shape \([2-5],\) .* \(1,\) by this"),
    "more kernels": ("", {}, {"delta__targets": ["query"]}, r"has the shape \(.*\) in the adapter and none by this"),
    "fewer kernels": (
        f"{UP}.*",
        {},
        {"delta__targets": ["encoder/.*/(kernel)"]},
        rf"'{UP}/a' has the shape none .* \(24, 2\) by this",
    ),
    "lower rank": ("", {}, {"delta__rank": 3, "delta__alpha": 48}, r"a' has the shape \(24, 2\) .* \(24, 3\) by this"),
}
"""The updates of the adapter against those of the config: regex over the arrays that it lacks, keys of its run, keys of the
config, and the line about them."""


@pytest.mark.parametrize(("drop", "recorded", "keys", "message"), OTHERS.values(), ids=OTHERS)
def test_start_from_a_run_with_other_updates_is_refused(cut, drop, recorded, keys, message):
    folder, config = cut
    change(folder, drop, **recorded)
    with pytest.raises(InputError, match=f"{message} config: set delta.targets, rank and nonzeros as in its run"):
        setup.prepare(config(**keys))
