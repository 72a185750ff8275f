"""Complete runs on a tiny checkpoint: their files and figures, and runs that start from another run."""

import json
import re

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import runs
from dsee_jax import tree
from dsee_jax.ckpt import adapter, checkpoints, folders, hf
from dsee_jax.errors import InputError
from dsee_jax.runtime import files
from dsee_jax.train import config_file, loop
from runs import run, zeros

KERNELS = ("attention/query", "attention/key", "attention/value", "attention/output", "mlp/up", "mlp/down")


@pytest.fixture(scope="module")
def dsee(finished_run):
    """A finished run of every stage as ``(folder, results)``; the files of the run are in ``folder / "run"``."""
    folder = finished_run("dsee")
    return folder, json.loads((folder / "run" / folders.METRICS).read_text())


@pytest.mark.smoke
def test_run_writes_its_files(dsee):
    folder, results = dsee
    out = folder / "run"
    assert {path.name for path in out.iterdir()} == {
        *("config.yaml", "hashes.json", "metrics.jsonl", "metrics.json", "checkpoints", "adapter", "model")
    }
    assert config_file.read(out / "config.yaml") == runs.config(folder)
    assert json.loads((out / "metrics.json").read_text()) == results
    assert results["task"] == "tiny"
    assert results["seed"] == 0
    assert [stage["name"] for stage in results["stages"]] == ["tune", "prune", "retune"]
    assert results["final"] == results["stages"][-1]["metrics"]
    assert set(results["final"]) == {"accuracy", "loss"}
    for stage in results["stages"]:
        assert 0 <= stage["metrics"]["accuracy"] <= 1
    assert {"jax", "flax", "device", "python"} == set(results["environment"])
    for key in ("model_bytes", "train_seconds", "train_tokens_per_second", "peak_memory_bytes"):
        assert results[key] > 0


@pytest.mark.smoke
def test_figures_match_hand_counts(dsee):
    """The counts are those of width 24, 40 neurons, one layer, and A, B of rank 2 and 5 values each on query and value."""
    folder, results = dsee
    kernels, trained = 4 * 24 * 24 + 2 * 24 * 40, 2 * (2 * (24 + 24) + 5)
    head = 24 * 24 + 24 + 24 * 2 + 2
    _, params = hf.load_pretrained(folder / "run" / "model")
    backbone = sum(leaf.size for leaf in tree.flatten(params).values()) - head
    assert results["trainable_parameters"] == trained
    assert results["head_parameters"] == head
    assert results["trainable_fraction"] == trained / backbone
    assert results["weight_sparsity"] == 0.5
    assert results["flops_per_token"] == {"dense": 2 * kernels, "final": 2 * (kernels // 2 + trained)}
    assert results["flops_ratio"] == pytest.approx((kernels // 2 + trained) / kernels)
    files = [folder / "run" / name for name in ("model/model.safetensors", "adapter/adapter.safetensors")]
    assert results["model_bytes"] == sum(path.stat().st_size for path in files)


def test_pruned_weights_are_zero_and_the_others_unchanged(dsee):
    """Bit for bit: pruned weights are 0.0, not -0.0; kept weights and all other untrained weights are pretrained values."""
    folder, _ = dsee
    masks = adapter.load(folder / "run" / "adapter").masks
    assert set(tree.flatten(masks)) == {f"encoder/layer_0/{name}/kernel" for name in KERNELS}
    assert sum(mask.size - mask.sum() for mask in tree.flatten(masks).values()) == 4 * 24 * 24 // 2 + 24 * 40
    for values in zeros(folder / "run", masks).values():
        assert not values.view(np.uint32).any()
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "run/model"))
    for name, array in before.items():
        kept = after[name] != 0 if array.ndim == 2 and "encoder" in name else np.ones(array.shape, bool)
        np.testing.assert_array_equal(after[name][kept], array[kept])


def test_log_has_every_evaluation_once(dsee):
    records = files.read(dsee[0] / "run" / "metrics.jsonl")
    marks = [(r["stage"], r["step"], "metrics" in r) for r in records]
    assert len(set(marks)) == len(marks)
    assert [(stage, step) for stage, step, scored in marks if scored] == [
        *(("before", 0), ("tune", 5), ("tune", 10), ("prune", 0), ("retune", 5), ("retune", 10))
    ]
    for record in records:
        if "metrics" not in record:
            assert set(record) == {"stage", "step", "loss", "learning_rate", "tokens_per_second"}


def test_evaluations_are_not_said_where_no_bar_is_drawn(dsee):
    """A log or a notebook shows how far a run is: one line for each evaluation."""
    said = json.loads((dsee[0] / "said.json").read_text())
    lines = [re.sub(r": accuracy 0\.\d{4}  loss .*", "", line) for line in said if ", step " in line]
    assert lines == [f"{stage}, step {step} of 10" for stage in ("tune", "retune") for step in (5, 10)]


def test_finished_run_is_not_repeated(dsee):
    folder, results = dsee
    times = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    lines = []
    assert loop.run(runs.config(folder), say=lines.append) == results
    assert "finished" in lines[0]
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()} == times


@pytest.mark.slow
def test_seed_determines_the_result(dsee, tmp_path):
    """Two runs with one seed have the same figures and files; another seed gives other figures."""
    folder, _ = dsee
    _, second = run(folder, output_dir=str(tmp_path / "again"))
    run(folder, output_dir=str(tmp_path / "other"), train__seed=1)
    first, again, other = (runs.figures(place) for place in (folder / "run", second, tmp_path / "other"))
    assert again == first
    assert other["final"]["loss"] != first["final"]["loss"]
    assert other["before"] != first["before"]
    for name in ("model/model.safetensors", "adapter/adapter.safetensors", "adapter/masks.safetensors"):
        left, right = (load_file(place / name) for place in (folder / "run", second))
        assert {key: array.tobytes() for key, array in left.items()} == {k: x.tobytes() for k, x in right.items()}


@pytest.mark.smoke
def test_lora_keeps_the_pretrained_weights(finished_run):
    """LoRA has no sparse values and no pruning: one stage, no masks, the pretrained weights in the model."""
    folder = finished_run("lora")
    out = folder / "run"
    results = json.loads((out / folders.METRICS).read_text())
    assert [stage["name"] for stage in results["stages"]] == ["tune"]
    assert results["weight_sparsity"] == 0
    assert results["trainable_parameters"] == 2 * 2 * 48
    assert results["flops_ratio"] > 1
    updates = adapter.load(out / "adapter")
    assert (updates.masks, updates.supports) == ({}, {})
    before, after = (load_file(folder / "model.safetensors") for folder in (folder / "base", out / "model"))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_full_fine_tuning_keeps_pruned_weights_at_zero(tmp_path):
    """Every kept weight changes, pruned weights stay exactly 0 during re-tuning, and the run writes no adapter."""
    results, out = run(
        tmp_path, delta__rank=0, delta__nonzeros=0, train__full=True, train__learning_rate=1e-3, train__epochs=1
    )
    assert results["trainable_fraction"] == 1.0
    assert results["trainable_parameters"] == results["backbone_parameters"]
    assert results["weight_sparsity"] == 0.5
    assert not (out / "adapter").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", out / "model"))
    for name, array in before.items():
        assert not np.array_equal(after[name], array)
        pruned = after[name] == 0
        assert not after[name][pruned].view(np.uint32).any()
    with checkpoints.opened(out / "checkpoints") as store:
        _, masks = checkpoints.latest(store)
    assert len(tree.flatten(masks)) == len(KERNELS)
    for values in zeros(out, tree.unflatten({k: np.asarray(v) for k, v in tree.flatten(masks).items()})).values():
        assert len(values)
        assert not values.view(np.uint32).any()


@pytest.mark.slow
def test_regression_run_has_the_regression_metrics(tmp_path):
    runs.table(tmp_path / "numbers", regression=True)
    results, out = run(
        tmp_path, data__dir=str(tmp_path / "numbers"), data__regression=True, train__epochs=1, train__retune_epochs=1
    )
    assert set(results["final"]) == {"pearson", "spearman", "loss"}
    assert results["head_parameters"] == 24 * 24 + 24 + 24 + 1
    assert json.loads((out / "model" / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}


def test_new_head_starts_from_a_model_of_another_task(tmp_path):
    """A task of two labels starts from the model of a regression and takes all of its weights but the classifier."""
    runs.settings(tmp_path)
    table = runs.table(tmp_path / "scores", regression=True)
    full = {"delta__rank": 0, "delta__nonzeros": 0, "train__full": True, "prune__kind": "none", "train__epochs": 0.2}
    options = {"data__dir": table, "data__regression": True, "output_dir": str(tmp_path / "first")}
    loop.run(runs.config(tmp_path, **full, **options), say=lambda text: None)
    _, first = hf.load_pretrained(tmp_path / "first/model", num_labels=1)

    again = {"model__path": str(tmp_path / "first/model"), "train__epochs": 0.2, "train__retune_epochs": 0.2}
    with pytest.raises(InputError, match="num_labels is 2, the file has 1 labels; new_head re-initialises"):
        loop.run(runs.config(tmp_path, **again), say=lambda text: None)
    assert not (tmp_path / "run").exists()
    loop.run(runs.config(tmp_path, model__new_head=True, **again), say=lambda text: None)
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert list(config["id2label"].values()) == ["no", "yes"]
    _, second = hf.load_pretrained(tmp_path / "run/model")
    # DSEE trains no encoder weights; half of the kernel entries are pruned.
    np.testing.assert_array_equal(second["embeddings"]["word"]["embedding"], first["embeddings"]["word"]["embedding"])
    before, after = (tree.get(one, "encoder/layer_0/attention/query/kernel") for one in (first, second))
    np.testing.assert_array_equal(after, np.where(np.asarray(after) != 0, before, 0))


def test_run_starts_from_the_adapter_of_another_run(dsee, tmp_path):
    """The second run starts with the final metrics of the first run, and the weights that the first run pruned stay zero."""
    folder, first = dsee
    on = {
        "model__path": str(folder / "run/model"),
        "delta__start": str(folder / "run/adapter"),
        "prune__score": "W",
        "train__epochs": 0.4,
        "train__retune_epochs": 0.4,
        "output_dir": str(tmp_path / "on"),
    }
    results, _ = run(folder, **on)
    assert results["before"] == pytest.approx(first["final"], rel=1e-5)
    before, after = (adapter.load(out / "adapter") for out in (folder / "run", tmp_path / "on"))
    assert tree.flatten(before.masks).keys() == tree.flatten(after.masks).keys()
    for path, mask in tree.flatten(before.masks).items():
        np.testing.assert_array_equal(tree.get(after.masks, path), mask)
    jax.tree.map(np.testing.assert_array_equal, after.supports, before.supports)
    changed = jax.tree.map(lambda x, y: np.abs(x - y).max() > 0, before.deltas, after.deltas)
    assert all(jax.tree.leaves(changed))

    for override, message in {
        "delta__rank=3": r"query/kernel/a' has the shape \(24, 2\) in the adapter and \(24, 3\) by this config: set",
        "delta__nonzeros=0": r"query/kernel/values' has the shape \(5,\) in the adapter and none by this config",
        "delta__targets=['.*/query/kernel']": "value/kernel/a' has the shape .* in the adapter and none by this config",
        "delta__alpha=4": "scale is 16.0 in the adapter and 2.0 by this config: set it as in its run",
        "delta__scale_sparse=false": "scale_sparse is True in the adapter and False by this config",
    }.items():
        key, _, value = override.partition("=")
        options = on | {key: yaml.safe_load(value), "output_dir": str(tmp_path / "bad")}
        with pytest.raises(InputError, match=message):
            run(folder, **options)
    with pytest.raises(InputError, match="nowhere does not exist"):
        run(folder, **on | {"delta__start": str(folder / "nowhere"), "output_dir": str(tmp_path / "bad")})
    assert not (tmp_path / "bad").exists()
