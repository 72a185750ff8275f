"""Whole runs on a tiny checkpoint: the files they leave, what is in them, and the other configs of the same loop."""

import itertools
import json

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import decoders
import runs
from dsee_jax import config as configs
from dsee_jax import finished, journal, loop, tickets, tree
from dsee_jax.ckpt import adapter, cuts, hf
from dsee_jax.ckpt import state as checkpoints
from dsee_jax.errors import InputError

KERNELS = ("attention/query", "attention/key", "attention/value", "attention/output", "mlp/up", "mlp/down")


def run(folder, **overrides):
    config = runs.config(folder, **overrides)
    return loop.run(config, say=lambda text: None), folder / config.output_dir


@pytest.fixture(scope="module")
def dsee(tmp_path_factory):
    """One finished run of every stage: ``(folder, results)``; its files are in ``folder / "run"``."""
    folder = tmp_path_factory.mktemp("dsee")
    return folder, run(folder)[0]


def zeros(run, masks):
    """The entries of the exported kernels that the masks cut."""
    _, params = hf.load_pretrained(run / "model")
    flat = tree.flatten(params)
    return {path: np.asarray(flat[path])[~mask] for path, mask in tree.flatten(masks).items()}


def test_the_files_of_a_run(dsee):
    folder, results = dsee
    out = folder / "run"
    assert {path.name for path in out.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "metrics.json", "checkpoints", "adapter", "model")
    }
    assert configs.read(out / "config.yaml") == runs.config(folder)
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


def test_the_figures_of_a_run(dsee):
    """Counted by hand: width 24, 40 neurons, one layer; query and value have A, B of rank 2 and 5 values each."""
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


def test_pruned_weights_are_exactly_zero_and_the_others_untouched(dsee):
    """Bit for bit: no -0.0, nothing near zero; the kept ones and all that is not trained are the pretrained ones."""
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


def test_the_log_of_a_run(dsee):
    records = journal.read(dsee[0] / "run" / "metrics.jsonl")
    seen = [(r["stage"], r["step"], "metrics" in r) for r in records]
    assert len(set(seen)) == len(seen)
    assert [(stage, step) for stage, step, scored in seen if scored] == [
        *(("before", 0), ("tune", 5), ("tune", 10), ("prune", 0), ("retune", 5), ("retune", 10))
    ]
    for record in records:
        if "metrics" not in record:
            assert set(record) == {"stage", "step", "loss", "learning_rate", "tokens_per_second"}


def test_a_finished_run_is_not_redone(dsee):
    folder, results = dsee
    files = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    said = []
    assert loop.run(runs.config(folder), say=said.append) == results
    assert "finished" in said[0]
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()} == files


def test_a_seed_decides_the_result(dsee):
    """The same seed gives the same figures twice; another seed gives other ones."""
    folder, _ = dsee
    run(folder, output_dir=str(folder / "again"))
    run(folder, output_dir=str(folder / "other"), train__seed=1)
    first, again, other = (runs.figures(folder / name) for name in ("run", "again", "other"))
    assert again == first
    assert other["final"]["loss"] != first["final"]["loss"]
    assert other["before"] != first["before"]
    for name in ("model/model.safetensors", "adapter/adapter.safetensors", "adapter/masks.safetensors"):
        left, right = (load_file(folder / run / name) for run in ("run", "again"))
        assert {key: array.tobytes() for key, array in left.items()} == {k: x.tobytes() for k, x in right.items()}


def test_lora(tmp_path):
    """No sparse part, no pruning: one stage, no masks, the pretrained weights as they were."""
    results, out = run(tmp_path, delta__nonzeros=0, prune__kind="none", train__epochs=1)
    assert [stage["name"] for stage in results["stages"]] == ["tune"]
    assert results["weight_sparsity"] == 0
    assert results["trainable_parameters"] == 2 * 2 * 48
    assert results["flops_ratio"] > 1
    kept = adapter.load(out / "adapter")
    assert (kept.masks, kept.supports) == ({}, {})
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "base", out / "model"))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_full_fine_tuning_keeps_what_is_pruned_at_zero(tmp_path):
    """Every weight moves, and the pruned ones stay exactly 0 through the steps of re-tuning; there is no adapter."""
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
        gone = after[name] == 0
        assert not after[name][gone].view(np.uint32).any()
    with checkpoints.opened(out / "checkpoints") as store:
        _, masks = checkpoints.latest(store)
    assert len(tree.flatten(masks)) == len(KERNELS)
    for values in zeros(out, tree.unflatten({k: np.asarray(v) for k, v in tree.flatten(masks).items()})).values():
        assert len(values)
        assert not values.view(np.uint32).any()


def test_n_m(tmp_path):
    results, out = run(tmp_path, prune__kind="nm", train__epochs=0.2, train__retune_epochs=0.2)
    assert results["weight_sparsity"] == 0.5
    for mask in tree.flatten(adapter.load(out / "adapter").masks).values():
        np.testing.assert_array_equal(mask.reshape(-1, 4, mask.shape[1]).sum(1), 2)


def test_structured(tmp_path):
    """One of three heads and 16 of 40 neurons go: every array is smaller, and the figures say so."""
    results, out = run(tmp_path, prune__kind="structured", prune__heads=1, prune__neurons=0.4, train__epochs=1)
    kernels, left = 4 * 24 * 24 + 2 * 24 * 40, 4 * 24 * 16 + 2 * 24 * 24
    assert results["kept"] == {"heads": [2], "neurons": [24]}
    assert results["weight_sparsity"] == pytest.approx(1 - left / kernels)
    kept = adapter.load(out / "adapter")
    assert kept.masks == {}
    assert kept.config["kept"] == results["kept"]
    factors = sum(leaf.size for leaf in tree.flatten(kept.deltas).values())
    # Query and value are 24 x 16 now; a value whose column went is gone.
    assert 2 * 2 * (24 + 16) <= factors <= 2 * (2 * (24 + 16) + 5)
    assert results["flops_per_token"] == {"dense": 2 * kernels, "final": 2 * (left + factors)}
    # Scores and mixing: 16 entries of every head that is left, with each of 16 positions.
    assert results["flops_per_example"] == {
        "length": 16,
        "dense": 2 * 16 * (kernels + 2 * 16 * 24),
        "final": 2 * 16 * (left + factors + 2 * 16 * 16),
    }
    assert results["trainable_parameters"] == 2 * (2 * (24 + 24) + 5)
    fields = json.loads((out / "model" / "config.json").read_text())
    assert (fields["kept_heads"], fields["kept_neurons"], fields["intermediate_size"]) == ([2], [24], 40)
    units = tree.flatten(cuts.read(out / "model"))
    assert {path: int(flags.sum()) for path, flags in units.items()} == {"heads/layer_0": 2, "neurons/layer_0": 24}
    _, before = hf.load_pretrained(tmp_path / "base")
    _, after = hf.load_pretrained(out / "model")
    up = lambda params: np.asarray(params["encoder"]["layer_0"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(up(after), up(before)[:, units["neurons/layer_0"]])


def test_earlybert(tmp_path):
    """Search, draw, rewind, tune: the model is smaller, and what the ticket keeps of it is what was pretrained."""
    results, out = run(
        tmp_path, prune__kind="earlybert", prune__heads=1, prune__neurons=0.4, prune__search=0.8, prune__check_every=2
    )
    assert [stage["name"] for stage in results["stages"]] == ["draw", "tune"]
    assert results["kept"] == {"heads": [2], "neurons": [24]}
    assert not adapter.load(out / "adapter").masks
    log = [record for record in journal.read(out / loop.LOG) if record["stage"] == "search"]
    checks = [record for record in log if "kept" in record]
    # 4 of 5 steps an epoch.
    assert [record["step"] for record in checks] == [2, 4]
    assert checks[0]["distance"] == {}
    assert all(0 <= distance <= 1 for distance in checks[1]["distance"].values())
    # Warmed up at step 0.4 of 4, and no further down.
    assert log[-2]["learning_rate"] == pytest.approx(1e-2)
    learned = np.asarray(checks[-1]["coefficients"]["heads"]["layer_0"])
    assert learned.shape == (3,)
    assert (learned != 1).all()
    kept = cuts.read(out / "model")
    np.testing.assert_array_equal(kept["heads"]["layer_0"], learned > learned.min())
    assert tickets.packed(kept) == checks[-1]["kept"]
    _, before = hf.load_pretrained(tmp_path / "base")
    _, after = hf.load_pretrained(out / "model")
    up = lambda params: np.asarray(params["encoder"]["layer_0"]["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(up(after), up(before)[:, kept["neurons"]["layer_0"]])


def test_a_ticket_is_tuned_from_where_it_was_pretrained(tmp_path, monkeypatch):
    """Full fine-tuning moved every weight in the search; tuning begins as if it had not been."""
    begun = []
    fit = loop.training.fit

    def watched(setup, compiled, stage, trained, *rest):
        begun.append(jax.tree.map(np.array, trained["params"]))
        return fit(setup, compiled, stage, trained, *rest)

    monkeypatch.setattr(loop.training, "fit", watched)
    _, out = run(
        tmp_path, prune__kind="earlybert", prune__heads=1, prune__search=1, train__epochs=0.2,
        delta__rank=0, delta__nonzeros=0, train__full=True, train__learning_rate=1e-2,
    )  # fmt: skip
    (found,) = begun
    _, before = hf.load_pretrained(tmp_path / "base")
    columns = np.repeat(cuts.read(out / "model")["heads"]["layer_0"], 8)
    kernel = lambda params: np.asarray(params["encoder"]["layer_0"]["attention"]["query"]["kernel"])
    np.testing.assert_array_equal(kernel(found), kernel(before)[:, columns])


def test_a_search_ends_when_the_mask_is_at_rest(tmp_path):
    """Every distance is below 1, so two checks after the first are enough; a large penalty pulls every coefficient down."""
    results, out = run(
        tmp_path, prune__kind="earlybert", prune__neurons=0.4, prune__search=2, prune__check_every=1,
        prune__tolerance=1, prune__patience=2, prune__penalty=100, delta__rank=0, delta__nonzeros=0,
        train__full=True, train__learning_rate=1e-3,
    )  # fmt: skip
    assert results["stages"][0]["steps"] == 3
    assert results["kept"] == {"heads": [3], "neurons": [24]}
    last = journal.read(out / loop.LOG)[3 * 2]
    assert (last["stage"], last["step"]) == ("search", 3)
    assert all(max(values) < 1 for layers in last["coefficients"].values() for values in layers.values())


@pytest.mark.slow
def test_full_fine_tuning_of_a_cut_model_and_on_from_it(tmp_path):
    """Every weight moves on in smaller arrays; a run that starts from the compact checkpoint cuts it once more."""
    cut = {"prune__kind": "structured", "prune__scope": "global", "train__epochs": 0.2, "train__retune_epochs": 0.2}
    full = {"delta__rank": 0, "delta__nonzeros": 0, "train__full": True, "train__learning_rate": 1e-3}
    results, out = run(tmp_path, prune__heads=3, prune__neurons=10, **cut, **full)
    assert results["kept"] == {"heads": [0], "neurons": [30]}
    assert not (out / "adapter").exists()
    again, _ = run(
        tmp_path, prune__neurons=0.5, model__path=str(out / "model"), output_dir=str(tmp_path / "again"),
        delta__targets=[".*/mlp/(up|down)/kernel"], **cut,
    )  # fmt: skip
    assert again["kept"] == {"heads": [0], "neurons": [15]}
    first, both = (tree.flatten(cuts.read(folder / "model")) for folder in (out, tmp_path / "again"))
    assert [flags.sum() for flags in both.values()] == [0, 15]
    assert not (both["neurons/layer_0"] & ~first["neurons/layer_0"]).any()
    emptied, _ = run(
        tmp_path, prune__neurons=40, output_dir=str(tmp_path / "empty"), delta__targets=[".*/mlp/up/kernel"], **cut
    )
    assert emptied["kept"] == {"heads": [3], "neurons": [0]}


def test_masks_of_a_gradual_schedule_only_shrink(tmp_path, monkeypatch):
    """Cubic: drawn again in the re-tuning, each mask within the one before; the last has the whole sparsity."""
    drawn = []
    draw = loop.cut.draw

    def watched(*args):
        drawn.append(tree.flatten(draw(*args)))
        return tree.unflatten(drawn[-1])

    monkeypatch.setattr(loop.cut, "draw", watched)
    results, out = run(
        tmp_path,
        prune__schedule="cubic",
        prune__schedule_updates=4,
        prune__sparsity=0.75,
        train__epochs=0.2,
        train__eval_every=1,
    )
    assert len(drawn) == 4
    for earlier, later in itertools.pairwise(drawn):
        for path in earlier:
            assert not np.any(np.asarray(later[path]) & ~np.asarray(earlier[path]))
    sizes = [1 - sum(int(m.sum()) for m in masks.values()) / sum(m.size for m in masks.values()) for masks in drawn]
    np.testing.assert_allclose(sizes, [0.75 * (1 - (1 - t) ** 3) for t in (0.25, 0.5, 0.75, 1)], atol=2e-4)
    assert results["weight_sparsity"] == 0.75
    # Until the last cut, at step 4 of 10, no evaluation may count as the best.
    assert results["stages"][-1]["best_step"] > 4
    assert tree.flatten(adapter.load(out / "adapter").masks).keys() == drawn[-1].keys()


@pytest.mark.parametrize(("schedule", "epochs"), [("one_shot", 0), ("cubic", 0), ("cubic", 0.2)])
def test_the_whole_sparsity_is_reached_however_short_the_retuning(tmp_path, schedule, epochs):
    """No step, or one step, is too few for a schedule of ten updates: all is cut in the stage prune."""
    results, _ = run(tmp_path, prune__schedule=schedule, train__epochs=0.2, train__retune_epochs=epochs)
    assert [stage["name"] for stage in results["stages"]] == ["tune", "prune", "retune"][: 3 if epochs else 2]
    assert results["weight_sparsity"] == 0.5


TWO_STEPS = {"data__examples": 16, "train__epochs": 1, "train__retune_epochs": 1}


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", pytest.param("deberta", marks=pytest.mark.slow)])
def test_other_encoders(tmp_path, family):
    """Two steps a stage, unstructured and then structured, from the checkpoint to the export and back."""
    common = TWO_STEPS | {"family": family, "delta__targets": [r"encoder/.*/kernel"]}
    results, out = run(tmp_path, **common)
    assert [stage.get("steps") for stage in results["stages"]] == [2, None, 2]
    assert results["weight_sparsity"] == 0.5
    assert finished.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    for values in zeros(out, adapter.load(out / "adapter").masks).values():
        assert not values.any()
    cut = {"prune__kind": "structured", "prune__heads": 1, "prune__neurons": 0.4, "output_dir": str(tmp_path / "cut")}
    results, out = run(tmp_path, **common, **cut)
    assert results["kept"] == {"heads": [2], "neurons": [24]}
    assert finished.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    finished.export(out, tmp_path / "dense")
    model, params = hf.load_pretrained(tmp_path / "dense")
    assert model.config.widths == {"heads": (3,), "neurons": (40,)}
    assert results["backbone_parameters"] + results["head_parameters"] == sum(x.size for x in jax.tree.leaves(params))


def test_examples_longer_than_the_positions(tmp_path):
    """Of 32 the first is the padding's."""
    with pytest.raises(InputError, match=r"data.max_length is 32; .* has 31 positions: use fewer"):
        run(tmp_path, family="roberta", data__max_length=32)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "unstructured"),
        ("qwen3", "structured"),
        *(pytest.param(family, "structured", marks=pytest.mark.slow) for family in ("mistral", "qwen2", "gpt2")),
    ],
)
def test_every_decoder(tmp_path, family, kind):
    """Two steps a stage, with a tokenizer that has no token for padding; where keys are shared a unit of heads is a group."""
    decoders.write(tmp_path / "base", **decoders.VARIANTS[family])
    runs.table(tmp_path / "data", words=(3, 5))
    results, out = run(
        tmp_path, train__epochs=0.4, train__retune_epochs=0.4, delta__targets=["decoder/.*/kernel"],
        prune__kind=kind, prune__scope="tensor", prune__heads=1, prune__neurons=0.5,
    )  # fmt: skip
    steps = [(stage["name"], stage.get("steps")) for stage in results["stages"]]
    assert steps == [("tune", 2), ("prune", None), ("retune", 2)]
    assert all(np.isfinite(stage["metrics"]["loss"]) for stage in results["stages"])
    assert results["head_parameters"] == 24 * 2
    heads, neurons = {"llama": (2, 40), "gpt2": (2, 48)}.get(family, (1, 20))
    assert results["kept"] == {"heads": [heads] * 2, "neurons": [neurons] * 2}
    if kind == "unstructured":
        assert results["weight_sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert finished.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    finished.export(out, tmp_path / "whole")
    whole, params = hf.load_pretrained(tmp_path / "whole")
    assert whole.config == whole.config.with_widths()
    assert params["classifier"]["kernel"].shape == (24, 2)


def test_regression(tmp_path):
    runs.table(tmp_path / "numbers", regression=True)
    results, out = run(
        tmp_path, data__dir=str(tmp_path / "numbers"), data__regression=True, train__epochs=1, train__retune_epochs=1
    )
    assert set(results["final"]) == {"pearson", "spearman", "loss"}
    assert results["head_parameters"] == 24 * 24 + 24 + 24 + 1
    assert json.loads((out / "model" / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}


def test_on_from_a_model_of_another_task(tmp_path):
    """A regression tuned in full, and on from what it left a task of two labels, which reads all but the classifier."""
    runs.settings(tmp_path)
    table = runs.table(tmp_path / "scores", regression=True)
    full = {"delta__rank": 0, "delta__nonzeros": 0, "train__full": True, "prune__kind": "none", "train__epochs": 0.2}
    options = {"data__dir": table, "data__regression": True, "output_dir": str(tmp_path / "first")}
    loop.run(runs.config(tmp_path, **full, **options), say=lambda text: None)
    _, first = hf.load_pretrained(tmp_path / "first/model", num_labels=1)

    again = {"model__path": str(tmp_path / "first/model"), "train__epochs": 0.2, "train__retune_epochs": 0.2}
    with pytest.raises(InputError, match="num_labels is 2, the file has 1 labels: pass num_labels, or new_head"):
        loop.run(runs.config(tmp_path, **again), say=lambda text: None)
    assert not (tmp_path / "run").exists()
    loop.run(runs.config(tmp_path, model__new_head=True, **again), say=lambda text: None)
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert list(config["id2label"].values()) == ["no", "yes"]
    _, second = hf.load_pretrained(tmp_path / "run/model")
    # What DSEE does not train is the first run's; half of the kernels of the encoder is pruned.
    np.testing.assert_array_equal(second["embeddings"]["word"]["embedding"], first["embeddings"]["word"]["embedding"])
    before, after = (tree.get(one, "encoder/layer_0/attention/query/kernel") for one in (first, second))
    np.testing.assert_array_equal(after, np.where(np.asarray(after) != 0, before, 0))


def test_on_from_the_updates_of_a_run(dsee):
    """It begins where that run ended, and what that one pruned stays zero."""
    folder, first = dsee
    on = {
        "model__path": str(folder / "run/model"),
        "delta__start": str(folder / "run/adapter"),
        "prune__score": "W",
        "train__epochs": 0.4,
        "train__retune_epochs": 0.4,
        "output_dir": str(folder / "on"),
    }
    results, _ = run(folder, **on)
    assert results["before"] == pytest.approx(first["final"], rel=1e-5)
    before, after = (adapter.load(folder / name / "adapter") for name in ("run", "on"))
    assert tree.flatten(before.masks).keys() == tree.flatten(after.masks).keys()
    for path, mask in tree.flatten(before.masks).items():
        np.testing.assert_array_equal(tree.get(after.masks, path), mask)
    jax.tree.map(np.testing.assert_array_equal, after.supports, before.supports)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max() > 0, before.deltas, after.deltas)
    assert all(jax.tree.leaves(moved))

    for other, message in {
        "delta__rank=3": r"query/kernel/a' is \(24, 2\) there and \(24, 3\) by this config: set delta.targets, rank",
        "delta__nonzeros=0": r"query/kernel/values' is \(5,\) there and not by this config",
        "delta__targets=['.*/query/kernel']": "value/kernel/a' is .* there and not by this config",
        "delta__alpha=4": "scale is 16.0 there and 2.0 by this config: set it as it was",
        "delta__scale_sparse=false": "scale_sparse is True there and False by this config",
    }.items():
        key, _, value = other.partition("=")
        changed = on | {key: yaml.safe_load(value), "output_dir": str(folder / "bad")}
        with pytest.raises(InputError, match=message):
            run(folder, **changed)
    with pytest.raises(InputError, match="nowhere/adapter_config.json: missing"):
        run(folder, **on | {"delta__start": str(folder / "nowhere"), "output_dir": str(folder / "bad")})
    assert not (folder / "bad").exists()
