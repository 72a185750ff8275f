"""Complete runs on a tiny checkpoint of each architecture."""

import jax
import numpy as np
import pytest

import decoders
import runs
from dsee_jax.ckpt import adapter, hf
from dsee_jax.errors import InputError
from dsee_jax.export.run import export_run
from dsee_jax.train import finished_run
from runs import run, zeros

TWO_STEPS = {"data__examples": 16, "train__epochs": 1, "train__retune_epochs": 1}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("roberta", marks=pytest.mark.exhaustive),
        pytest.param("deberta", marks=pytest.mark.exhaustive),
        pytest.param("mpnet", marks=pytest.mark.exhaustive),
        pytest.param("xlm-roberta", marks=pytest.mark.exhaustive),
    ],
)
def test_run_of_every_encoder(tmp_path, family):
    """Two steps per stage, unstructured and then structured pruning, from the checkpoint to the export and back."""
    common = TWO_STEPS | {"family": family, "delta__targets": [r"encoder/.*/kernel"]}
    results, out = run(tmp_path, **common)
    assert [stage.get("steps") for stage in results["stages"]] == [2, None, 2]
    assert results["weight_sparsity"] == 0.5
    assert finished_run.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    for values in zeros(out, adapter.load(out / "adapter").masks).values():
        assert not values.any()
    cut = {"prune__kind": "structured", "prune__heads": 1, "prune__neurons": 0.4, "output_dir": str(tmp_path / "cut")}
    results, out = run(tmp_path, **common, **cut)
    assert results["kept"] == {"heads": [2], "neurons": [24]}
    assert finished_run.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    export_run(out, tmp_path / "dense")
    model, params = hf.load_pretrained(tmp_path / "dense")
    # config.json has a field for neurons, and none for heads: zeros stand for the pruned head.
    assert model.config.widths == {"heads": (3,), "neurons": (24,)}
    removed = 16 * (24 + 1 + 24)
    parameters = results["backbone_parameters"] + results["head_parameters"]
    assert parameters - removed == sum(x.size for x in jax.tree.leaves(params))


def test_max_length_beyond_the_positions_is_refused(tmp_path):
    """The first of RoBERTa's 32 positions is the padding's."""
    with pytest.raises(InputError, match=r"data.max_length is 32; .* has 31 positions: use fewer"):
        run(tmp_path, family="roberta", data__max_length=32)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3", "structured"),
        pytest.param("llama", "unstructured", marks=pytest.mark.exhaustive),
        *(pytest.param(family, "structured", marks=pytest.mark.exhaustive) for family in ("gpt2", "mistral", "qwen2")),
    ],
)
def test_run_of_every_decoder(tmp_path, family, kind):
    """Two steps per stage, a tokenizer without a padding token; where query heads share keys, a head is a group of them."""
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    decoders.write(tmp_path / "base", **decoders.VARIANTS[family] | {depth: 1})
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
    assert results["kept"] == {"heads": [heads], "neurons": [neurons]}
    if kind == "unstructured":
        assert results["weight_sparsity"] == pytest.approx(0.5, abs=1e-4)
    assert finished_run.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    export_run(out, tmp_path / "whole")
    whole, params = hf.load_pretrained(tmp_path / "whole")
    assert whole.config == whole.config.with_widths()
    assert params["classifier"]["kernel"].shape == (24, 2)
