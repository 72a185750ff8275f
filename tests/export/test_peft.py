"""PEFT adapters: PEFT on torch and the adapter reader of `merge` compute the tuned logits."""

import json

import numpy as np
import pytest

import decoders
import dsee_jax
import runs
import tiny
from dsee_jax import __main__ as command
from dsee_jax.train import loop
from merge.compare import compare
from merge.inputs.sources import open_source

LORA = runs.FINISHED["lora"]


@pytest.fixture(scope="module")
def lora(finished_run):
    """A finished LoRA run."""
    return finished_run("lora") / "run"


def export_as(run, out, form="peft"):
    assert command.main(["export", str(run), str(out), "--format", form]) == 0
    return out


@pytest.mark.smoke
def test_base_plus_adapter_equals_the_folded_export(lora, tmp_path):
    """Base + adapter, read by `merge`, equals the export with folded updates."""
    out = export_as(lora, tmp_path / "peft")
    settings = json.loads((out / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 7.0)
    assert settings["modules_to_save"] == ["bert.pooler.dense", "classifier"]
    adapted = open_source(f"{settings['base_model_name_or_path']}+{out}", tmp_path)
    comparison = compare(open_source(str(export_as(lora, tmp_path / "hf", "hf")), tmp_path), adapted)
    assert (comparison.only_a, comparison.only_b, comparison.reshaped) == ([], [], [])
    assert comparison.total.largest < 1e-6


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_peft_computes_the_tuned_logits(lora, tmp_path):
    """The base has a random head, which the adapter replaces."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import BertForSequenceClassification

    out = export_as(lora, tmp_path / "out")
    base = BertForSequenceClassification.from_pretrained(lora.parent / "base", num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x).long() for name, x in tiny.batch().items()}).logits.numpy()
    model, params = dsee_jax.load_pretrained(export_as(lora, tmp_path / "hf", "hf"))
    np.testing.assert_allclose(dsee_jax.apply(model, params, None, tiny.batch()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"delta__nonzeros": 5}, "PEFT has no sparse values"),
        ({"prune__kind": "unstructured"}, "this run has pruned them"),
        ({"prune__kind": "structured", "prune__heads": 1}, "this run has pruned them"),
        ({"delta__rank": 0, "train__full": True}, "has no low-rank updates"),
    ],
)
def test_run_beyond_peft_is_refused(tmp_path, capsys, keys, message):
    loop.run(runs.config(tmp_path, **LORA | {"train__retune_epochs": 0} | keys), say=lambda text: None)
    assert command.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "peft"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_part_of_a_fused_tensor_is_refused(tmp_path, capsys):
    """GPT-2 has one tensor for query, key and value, which PEFT can only update as one."""
    decoders.write(tmp_path / "base", **decoders.VARIANTS["gpt2"])
    runs.table(tmp_path / "data")
    loop.run(runs.config(tmp_path, **LORA), say=lambda text: None)
    assert command.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "peft"]) == 2
    assert "attention/query/kernel' is one part of 'transformer.h.0.attn.c_attn.weight'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
