"""Runs that start from an adapter of PEFT (``delta.start``)."""

import json

import numpy as np
import pytest

import decoders
import loras
import runs
import tiny
from dsee_jax import __main__ as command
from dsee_jax import tree
from dsee_jax.ckpt import adapter, hf
from dsee_jax.errors import InputError
from dsee_jax.train import finished_run, setup

SELF = "bert.encoder.layer.0.attention.self"
BRIEF = {"prune__kind": "none", "train__epochs": 0.4, "delta__nonzeros": 3, "delta__rank": 16}


def bert_lora(folder, **settings):
    """Write a LoRA of a BERT of one layer and two labels, with its head."""
    noise = np.random.default_rng(1)
    head = {"bert.pooler.dense": (24, 24), "classifier": (2, 24)}
    arrays = loras.pairs({f"{SELF}.query": (24, 24), f"{SELF}.value": (24, 24)})
    for name, (outputs, inputs) in head.items():
        arrays |= {f"{name}.weight": noise.normal(0, 0.3, (outputs, inputs)).astype(np.float32)}
        arrays |= {f"{name}.bias": noise.normal(0, 0.3, outputs).astype(np.float32)}
    return loras.write(folder, arrays, modules_to_save=[*head], task_type="SEQ_CLS", **settings)


def test_config_takes_targets_rank_and_scale_of_the_adapter(tmp_path):
    tiny.bert(tmp_path / "base", num_hidden_layers=1)
    model = hf.abstract_model(tmp_path / "base")
    start = bert_lora(tmp_path / "lora", alpha_pattern={"value": 1})
    config = runs.config(tmp_path, delta__start=str(start), delta__rank=16, delta__nonzeros=3)
    resolved, begun = setup.with_start(config, tmp_path / "base", model)
    assert (resolved.delta.rank, resolved.delta.alpha, resolved.delta.nonzeros) == (2, 6.0, 3)
    assert list(tree.flatten(begun.saved.params)) == [
        "classifier/bias",
        "classifier/kernel",
        "pooler/bias",
        "pooler/kernel",
    ]
    kernels = [f"encoder/layer_0/attention/{name}/kernel" for name in ("query", "value", "key")]
    assert tree.select(resolved.delta.targets, kernels) == kernels[:2]


def test_start_that_does_not_exist_is_named(tmp_path):
    tiny.bert(tmp_path / "base", num_hidden_layers=1)
    config = runs.config(tmp_path, delta__start=str(tmp_path / "lora"))
    with pytest.raises(InputError, match=f"{tmp_path / 'lora'} does not exist"):
        setup.with_start(config, tmp_path / "base", hf.abstract_model(tmp_path / "base"))


@pytest.mark.parametrize("options", [{"kind": "unstructured"}, {"kind": "nm"}, {"kind": "structured", "heads": 1}])
@pytest.mark.parametrize("score", ["AB", "ABS"])
def test_score_of_the_update_is_refused_where_the_adapter_has_values_alone(tmp_path, options, score):
    """The config knows the largest rank alone. Entries without a value would all score 0, and their order would decide."""
    arrays = loras.pairs({f"{SELF}.query": (24, 24)})
    arrays |= {f"{SELF}.value.supertuning_values": np.ones(3, np.float32)}
    arrays |= {f"{SELF}.value.supertuning_indices": np.arange(3, dtype=np.int32)}
    arrays = {name.replace(".lora_", ".supertuning_lora_"): array for name, array in arrays.items()}
    start = loras.write(tmp_path / "both", arrays, peft_type="SUPERTUNING")
    own = {"delta__start": str(start)} | {f"prune__{key}": value for key, value in options.items()}
    path = "encoder/layer_0/attention/value/kernel"
    message = f"prune.score is '{score}'; the update of '{path}' has values and no low-rank part"
    with pytest.raises(InputError, match=message):
        setup.prepare(runs.config(tmp_path, prune__score=score, **own))
    setup.prepare(runs.config(tmp_path, prune__score="WABS", **own))
    if "heads" not in options:
        setup.prepare(runs.config(tmp_path, prune__score=score, prune__targets=["query", "key"], **own))


@pytest.mark.slow
def test_run_goes_on_from_the_adapter(tmp_path):
    """It starts with the logits of the adapter and its head, gets sparse values, and its files say the same."""
    start = bert_lora(tmp_path / "lora", alpha_pattern={"value": 1})
    results, run = runs.run(tmp_path, delta__start=str(start), **BRIEF)
    assert results["before"] == pytest.approx(finished_run.evaluate(run, other=str(start)), rel=1e-5)
    assert results["final"] == pytest.approx(finished_run.evaluate(run), rel=1e-5)
    saved = adapter.load(run / "adapter")
    assert saved.config["scale"] == 3.0
    update = tree.get(saved.deltas, "encoder/layer_0/attention/value/kernel")
    assert {part: leaf.shape for part, leaf in update.items()} == {"a": (24, 2), "b": (2, 24), "values": (3,)}
    assert np.abs(update["values"]).min() > 0
    assert command.main(["export", str(run), str(tmp_path / "out"), "--format", "peft"]) == 0
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("SUPERTUNING", 2, 6.0)
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    again = finished_run.evaluate(run, other=str(tmp_path / "out"))
    assert again == pytest.approx(results["final"], rel=1e-5)


@pytest.mark.slow
def test_scanned_decoder_goes_on_from_the_adapter(tmp_path):
    decoders.write(tmp_path / "base")
    shapes = {f"model.layers.{layer}.self_attn.v_proj": (8, 24) for layer in range(2)}
    ranks = loras.pairs(shapes) | loras.pairs(dict([*shapes.items()][:1]), rank=3)
    ranks["model.norm.weight"] = np.linspace(0.5, 1.5, 24, dtype=np.float32)
    start = loras.write(tmp_path / "lora", ranks, modules_to_save=["norm"])
    options = runs.causal_lm(tmp_path, model__scan=True, delta__start=str(start), generate__new_tokens=0)
    results, run = runs.run(tmp_path, **options | BRIEF)
    assert results["before"] == pytest.approx(finished_run.evaluate(run, other=str(start)), rel=1e-4)
    assert results["final"] == pytest.approx(finished_run.evaluate(run), rel=1e-4)
    saved = adapter.load(run / "adapter").params
    (trained,) = tree.flatten(saved).values()  # a module that PEFT trained whole is trained on
    assert np.abs(trained - ranks["model.norm.weight"]).max() > 0
