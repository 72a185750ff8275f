"""PEFT adapters: PEFT on torch and the adapter reader of `merge` compute the tuned logits."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import decoders
import dsee_jax
import runs
import tiny
from dsee_jax import __main__ as command
from dsee_jax import tree
from dsee_jax.ckpt import adapter
from dsee_jax.ckpt.adapter import Saved
from dsee_jax.export import peft
from dsee_jax.train.finished_run import load, plain_params
from merge.compare import compare
from merge.inputs.sources import open_source


def export_as(run, out, form="peft"):
    assert command.main(["export", str(run), str(out), "--format", form]) == 0
    return out


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("kind", "base", "settings"),
    [
        ("lora", "base", {"peft_type": "LORA", "r": 2, "lora_alpha": 7.0}),
        ("dsee", "run/model", {"peft_type": "SUPERTUNING", "r": 2, "lora_alpha": 32.0}),
    ],
)
def test_base_plus_adapter_equals_the_folded_export(finished_run, tmp_path, kind, base, settings):
    """Base + adapter, read by `merge`, equals the export with folded updates; the base of a pruned run is its model/."""
    folder = finished_run(kind)
    out = export_as(folder / "run", tmp_path / "peft")
    expected = settings | {"base_model_name_or_path": str(folder / base)}
    expected["modules_to_save"] = ["bert.pooler.dense", "classifier"]
    written = json.loads((out / "adapter_config.json").read_text())
    assert {name: written[name] for name in expected} == expected
    adapted = open_source(f"{folder / base}+{out}", tmp_path)
    comparison = compare(open_source(str(export_as(folder / "run", tmp_path / "hf", "hf")), tmp_path), adapted)
    assert (comparison.only_a, comparison.only_b, comparison.reshaped) == ([], [], [])
    assert comparison.total.largest < 1e-6


def lora_cases():
    """Bases and updates, by name: task, writer of the base, options of the updates, type of the adapter."""
    bert, deberta = tiny.bert, lambda folder: tiny.bert(folder, model_type="deberta")
    llama, gpt2 = (
        lambda folder, name=name: decoders.write(folder, **decoders.VARIANTS[name]) for name in ("llama", "gpt2")
    )
    label, text = "sequence-classification", "causal-lm"
    every = {"targets": (r".*(attention|mlp)/.*/kernel", r".*(up|down)/kernel")}
    low, sparse = {"nonzeros": 0}, {"rank": 0}
    return {
        "bert, low-rank": (label, bert, low, "LORA"),
        "bert, both": (label, bert, {"scale_sparse": False}, "SUPERTUNING"),
        "bert, kernels of other sizes": (label, bert, every, "SUPERTUNING"),
        "deberta, part of a weight": (label, deberta, {"targets": ("query", "attention/output")}, "SUPERTUNING"),
        "llama, sparse": (text, llama, sparse, "SUPERTUNING"),
        "llama, every kernel": (text, llama, every, "SUPERTUNING"),
        "gpt2, low-rank": (text, gpt2, low | every, "LORA"),
        "gpt2, both": (text, gpt2, every, "LORA"),
        "gpt2, sparse": (text, gpt2, sparse, "LORA"),
    }


CASES = lora_cases()
ALIKE = ("llama, every kernel", "gpt2, sparse")
"""Cases that other cases resemble."""


def random_updates(params, *, targets, rank, nonzeros, scale, scale_sparse):
    """Return an adapter of random updates, whose coordinates are in row-major order."""
    flat, noise, deltas, supports = tree.flatten(params), np.random.default_rng(0), {}, {}
    for path in tree.select(targets, flat):
        rows, columns = flat[path].shape
        if rank:
            deltas[f"{path}/a"] = noise.normal(0, 0.1, (rows, rank)).astype(np.float32)
            deltas[f"{path}/b"] = noise.normal(0, 0.1, (rank, columns)).astype(np.float32)
        if nonzeros:
            places = np.sort(noise.choice(rows * columns, nonzeros, replace=False))
            supports[path] = np.stack(np.divmod(places, columns), axis=1).astype(np.int32)
            deltas[f"{path}/values"] = noise.normal(0, 0.1, nonzeros).astype(np.float32)
    return dsee_jax.Adapter(tree.unflatten(deltas), tree.unflatten(supports), scale, scale_sparse)


def dense(adapter, params):
    """Return the dense updates of kernels."""
    flat, result = tree.flatten(params), {}
    for path, (delta, support, _) in adapter.updates.items():
        result[path] = np.zeros(flat[path].shape)
        if "a" in delta:
            result[path] += adapter.scale * delta["a"] @ delta["b"]
        if support is not None:
            scale = adapter.scale if adapter.scale_sparse else 1.0
            np.add.at(result[path], tuple(support.T), scale * delta["values"])
    return result


def made(folder, name):
    """Write the base of a case and an adapter of random updates; return model, params and updates, and the settings."""
    task, write, options, _ = CASES[name]
    write(folder / "base")
    model, params = dsee_jax.load_pretrained(folder / "base", task)
    options = {"targets": ["query", "value"], "rank": 2, "nonzeros": 7, "scale": 1.5, "scale_sparse": True} | options
    updates = random_updates(params, **options)
    head = {"classifier": params["classifier"]} if task == "sequence-classification" else {}
    about = {"scale": updates.scale, "scale_sparse": updates.scale_sparse}
    saved = Saved(updates.deltas, updates.supports, head, {}, about, {})
    peft.save(folder / "out", model, saved, base=str(folder / "base"))
    return model, params, updates


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.exhaustive] if "low-rank" in name or name in ALIKE else [])
        for name in CASES
    ],
)
def test_exported_adapter_read_again_is_the_same_update(tmp_path, name):
    """Folded into the kernels: ranks of several kernels are joined, sparse values may have become ranks."""
    model, params, updates = made(tmp_path, name)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == CASES[name][3]
    again, adapter = dsee_jax.load_adapter(tmp_path / "out", model, params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    actual, expected = (dense(each, params) for each in (adapter, updates))
    assert actual.keys() >= expected.keys()
    for path, update in actual.items():
        np.testing.assert_allclose(update, expected.get(path, 0 * update), rtol=0, atol=2e-6, err_msg=path)


def test_every_module_has_the_count_of_values_that_peft_allocates(tmp_path):
    """PEFT computes the count from one sparsity for all modules; positions are used once."""
    made(tmp_path, "bert, kernels of other sizes")
    sparsity = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["sparsity"]
    arrays = load_file(tmp_path / "out" / "adapter_model.safetensors")
    counts = set()
    for name, indices in arrays.items():
        module, _, part = name.rpartition(".supertuning_")
        if part == "indices":
            rows, columns = (arrays[f"{module}.supertuning_lora_{factor}.weight"].shape for factor in "AB")
            assert len(indices) == int(rows[1] * columns[0] * (1 - sparsity)) == len({*indices.tolist()})
            assert len(indices) == len(arrays[f"{module}.supertuning_values"])
            counts.add(len(indices))
    assert min(counts) == 7 < max(counts)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other
@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_logits_of_an_exported_adapter(tmp_path, name):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    model, params, updates = made(tmp_path, name)
    kind = "AutoModelForCausalLM" if model.task == "causal-lm" else "AutoModelForSequenceClassification"
    base = getattr(transformers, kind).from_pretrained(tmp_path / "base")
    theirs = library.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    batch = tiny.batch(padded=False)
    if model.task == "causal-lm":
        del batch["token_type_ids"]
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x).long() for name, x in batch.items()}).logits.numpy()
    plain, logits = (np.asarray(dsee_jax.apply(model, params, each, batch)) for each in (None, updates))
    print(f"{name}: {np.abs(logits - expected).max():.1e} of {np.abs(expected).max():.1e}")
    assert np.abs(plain - logits).max() > 1e-2
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "base"), [("lora", "base"), ("dsee", "run/model")])
def test_peft_computes_the_tuned_logits(finished_run, tmp_path, kind, base):
    """The pretrained base has a random head, which the adapter replaces; a pruned run has its own base."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import BertForSequenceClassification

    folder = finished_run(kind)
    out = export_as(folder / "run", tmp_path / "out")
    model = BertForSequenceClassification.from_pretrained(folder / base, num_labels=2)
    theirs = library.PeftModel.from_pretrained(model, out).eval()
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x).long() for name, x in tiny.batch().items()}).logits.numpy()
    model, params = dsee_jax.load_pretrained(export_as(folder / "run", tmp_path / "hf", "hf"))
    logits = np.asarray(dsee_jax.apply(model, params, None, tiny.batch()))
    print(f"{kind}: {np.abs(logits - expected).max():.1e}")
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parity
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other
def test_peft_opens_an_equally_cut_decoder_with_its_adapter(tmp_path):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    decoders.write(tmp_path / "base", num_key_value_heads=6)
    every = ["decoder/.*/kernel"]
    cut = {"prune__kind": "structured", "prune__uniform": True, "prune__heads": 2, "prune__neurons": 10}
    brief = {"train__epochs": 0.4, "train__retune_epochs": 0.4, "generate__new_tokens": 0}
    _, run = runs.run(tmp_path, **runs.causal_lm(tmp_path, **cut, **brief, prune__targets=every, delta__targets=every))
    out = export_as(run, tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    theirs = library.PeftModel.from_pretrained(base, out).eval()
    batch = {name: array for name, array in tiny.batch(padded=False).items() if name != "token_type_ids"}
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x).long() for name, x in batch.items()}).logits.numpy()
    model, params = dsee_jax.load_pretrained(run / "model", "causal-lm")
    logits = np.asarray(dsee_jax.apply(model, params, adapter.load(run / "adapter").adapter, batch))
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()


def test_adapter_names_the_hub_id_of_its_base(finished_run, tmp_path, capsys, caplog):
    """A base of this machine has a warning with the fix, and a remark on the card; other exports have no base."""
    run, out = finished_run("dsee") / "run", tmp_path / "out"
    export_as(run, out)
    assert f"hf upload OWNER/NAME {run / 'model'}), and export again with --base OWNER/NAME" in caplog.text
    assert "upload the base to the hub" in (out / "README.md").read_text()
    caplog.clear()
    arguments = ["export", str(run), str(out), "--overwrite"]
    assert command.main([*arguments, "--format", "peft", "--base", "me/base"]) == 0
    assert "--base" not in caplog.text
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"
    card = (out / "README.md").read_text()
    assert "base_model:\n- me/base\n" in card
    assert "upload the base" not in card
    capsys.readouterr()
    refused = {"--base does not apply to --format hf": "me/base", "is no hub id; expected OWNER/NAME": str(tmp_path)}
    for (line, base), form in zip(refused.items(), ("hf", "peft"), strict=True):
        assert command.main([*arguments, "--format", form, "--base", base]) == 2
        assert line in capsys.readouterr().err


def test_run_beyond_peft_is_refused(finished_run, tmp_path, capsys):
    """Layers of different widths."""
    run = finished_run("structured") / "run"
    assert command.main(["export", str(run), str(tmp_path / "out"), "--format", "peft"]) == 2
    said = capsys.readouterr().err
    assert "model has lost heads, and its config.json" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_run_without_updates_is_refused(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run("lora") / "run", run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"\brank: 2\b", "rank: 0", config))
    assert command.main(["export", str(run), str(tmp_path / "out"), "--format", "peft"]) == 2
    assert "has no updates (delta.rank and delta.nonzeros are 0)" in capsys.readouterr().err


def test_run_whose_updates_are_all_cut_opens_and_has_every_other_format(finished_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished_run("structured") / "run", run)
    saved = adapter.load(run / "adapter")
    adapter.save(run / "adapter", saved._replace(deltas={}, supports={}))
    finished = load(run)
    jax.tree.map(np.testing.assert_array_equal, plain_params(finished), finished.params)
    assert command.main(["export", str(run), str(tmp_path / "compact"), "--format", "compact", "--factors"]) == 0
    assert (tmp_path / "compact/adapter/adapter.safetensors").exists()
    assert command.main(["export", str(run), str(tmp_path / "out"), "--format", "peft"]) == 2
    assert "has no updates (its pruning removed them all): use --format hf" in capsys.readouterr().err
