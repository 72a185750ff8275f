"""The commands: bad input is one line and writes nothing; every verb on a finished run."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import dsee_jax
import runs
import tiny
import train
from dsee_jax import __main__ as command
from dsee_jax.ckpt import adapter, folders, hf, kept_units
from dsee_jax.train import loop

ROOT = pathlib.Path(__file__).parents[2]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_weights(folder):
    shutil.move(folder / "base" / "model.safetensors", folder / "base" / "pytorch_model.bin")


def truncated(folder):
    path = folder / "base" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def small_embedding(folder):
    tiny.bert(folder / "base", num_hidden_layers=1, vocab_size=len(tiny.VOCABULARY) - 25)


def five_heads(folder):
    config = folder / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 5}))


def a_cut_of_other_widths(folder):
    kept_units.write(folder / "base", {"heads": {"layer_0": np.array([True, False, True])}})


def a_cut_of_more_heads(folder):
    kept_units.write(folder / "base", {"heads": {"layer_0": np.ones(4, bool)}})


def label(folder):
    with (folder / "data" / "dev.csv").open("a") as file:
        file.write("a cat,perhaps\n")


def empty(folder):
    (folder / "data" / "train.csv").write_text("")


def short_row(folder):
    (folder / "data" / "RTE").mkdir()
    header = "index\tsentence1\tsentence2\tlabel\n"
    for name in ("train", "dev"):
        (folder / "data" / "RTE" / f"{name}.tsv").write_text(f"{header}0\ta\tb\tentailment\n1\ta\tb\n")


def other_run(folder):
    (folder / "run").mkdir()
    other = runs.config(folder, train__seed=5)
    (folder / "run" / "config.yaml").write_text(dsee_jax.train.config_file.dump(other))


def other_files(folder):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("precious")


BAD = {
    "no model": (None, {"model__path": "/nowhere/model"}, "model folder /nowhere/model does not exist"),
    "pickle": (no_weights, {}, "pytorch_model.bin is a pickle"),
    "truncated": (truncated, {}, "model.safetensors is not a complete safetensors file"),
    "unknown key": (None, {"train__learning_rat": 1}, "(did you mean 'learning_rate'?)"),
    "a rule that matches nothing": (
        None,
        {"delta__targets": [".*/querry/kernel"]},
        "'.*/querry/kernel' matches nothing",
    ),
    "a rule of pruning": (None, {"prune__targets": ["decoder/.*"]}, "'decoder/.*' matches nothing"),
    "pruning a bias": (None, {"prune__targets": [".*/bias"]}, "expected a kernel (in, out)"),
    "groups that do not fit": (None, {"prune__kind": "nm", "prune__m": 5}, "prune.m is 5;"),
    "a score of nothing": (None, {"prune__score": "AB", "delta__rank": 0}, "prune.score is 'AB'"),
    "nonzeros": (None, {"delta__nonzeros": 577}, "delta.nonzeros is 577;"),
    "sparsity": (None, {"prune__sparsity": 1.0}, "prune.sparsity is 1.0; expected"),
    "all heads": (None, {"prune__kind": "structured", "prune__heads": 1.0}, "prune.heads is 1.0; expected a fraction"),
    "all neurons": (
        None,
        {"prune__kind": "structured", "prune__neurons": 1.0},
        "prune.neurons is 1.0; expected a fraction in [0, 1) or a whole number: 1.0 leaves none",
    ),
    "heads that do not divide": (five_heads, {}, "'hidden_size' is 24, not a multiple of 'num_attention_heads' = 5"),
    "a dense model with units of a cut": (a_cut_of_other_widths, {}, "kept.safetensors: the model has the widths"),
    "units of another model": (
        a_cut_of_more_heads,
        {},
        "the kept units give {'heads': (4,), 'neurons': (40,)}: this file and config.json must be written together",
    ),
    "too many heads": (None, {"prune__kind": "structured", "prune__heads": 4}, "prune.heads is 4 and there are 3"),
    "nothing to cut": (None, {"prune__kind": "structured"}, "prune.heads is 0; expected more than 0"),
    "a unit in part": (
        None,
        {"prune__kind": "structured", "prune__heads": 1, "prune__targets": [".*/query/kernel"]},
        "prune.targets leaves out 'encoder/layer_0/attention/key/kernel'",
    ),
    "label": (label, {}, "dev.csv:22: label 'perhaps' is outside the task"),
    "empty file": (empty, {}, "train.csv: the file is empty"),
    "short row": (short_row, {"data__source": "glue", "data__task": "rte"}, "train.tsv:3: the row has 3 columns"),
    "vocabulary": (small_embedding, {}, "vocabulary larger than the embedding"),
    "too long": (None, {"data__max_length": 64}, "data.max_length is 64;"),
    "another run's folder": (other_run, {}, "belongs to another config: train.seed is 5 in its config and 0 in yours"),
    "a folder of other things": (other_files, {}, "it is no run's"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, name):
    spoil, options, message = BAD[name]
    arguments = runs.arguments(tmp_path, **options)
    if spoil:
        spoil(tmp_path)
    before = files(tmp_path)
    assert train.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("train.py: ")
    assert message in said.err
    assert files(tmp_path) == before
    assert said.out == ""


def test_bad_input_from_the_shell_is_one_line(tmp_path):
    """Exit status 2 and one line on stderr, though a head is created and transformers is imported."""
    arguments = runs.arguments(tmp_path)
    shutil.rmtree(tmp_path / "base")
    tiny.bert(tmp_path / "base", head=False, vocab_size=len(tiny.VOCABULARY) - 25)
    done = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "vocabulary larger than the embedding" in done.stderr
    assert "classifier/kernel, pooler/bias, pooler/kernel: created at random" in done.stdout
    assert not (tmp_path / "run").exists()


def test_internal_error_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "prepare", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(runs.arguments(tmp_path))


@pytest.mark.parametrize(
    "arguments", [[], ["evaluate"], ["export"], ["report"], ["inspect"], ["statistics"], ["generate"], ["plan"]]
)
def test_help_of_every_verb(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        command.main([*arguments, "--help"])
    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out


@pytest.mark.smoke
def test_help_of_the_main_job(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    assert train.main(["--keys"]) == 0
    assert "delta.nonzeros = 64" in capsys.readouterr().out


def test_unknown_verb_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["evaluat", "x"])
    assert stop.value.code == 2
    assert "invalid choice: 'evaluat'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(finished_run):
    """The folder of a finished run, and its results."""
    run = finished_run("dsee") / "run"
    return run, json.loads((run / folders.METRICS).read_text())


@pytest.mark.smoke
@pytest.mark.parametrize("overrides", [[], ["--train.batch_size=4"]])
def test_evaluate_prints_the_final_metrics(finished, capsys, overrides):
    """From the files alone, at any batch size."""
    assert command.main(["evaluate", str(finished[0]), *overrides]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(finished[1]["final"], abs=1e-6)


@functools.cache
def compiled(model):
    return jax.jit(functools.partial(dsee_jax.apply, model))


def logits(folder, updates=None):
    model, params = dsee_jax.load_pretrained(folder)
    return np.asarray(compiled(model)(params, updates, tiny.batch()))


@pytest.mark.smoke
def test_folded_export_has_the_tuned_logits(finished, tmp_path, capsys):
    """The logits of the folder equal those of the model with attached updates."""
    run = finished[0]
    assert command.main(["export", str(run), str(tmp_path / "out"), "--format", "hf"]) == 0
    attached = logits(run / "model", adapter.load(run / "adapter").adapter)
    np.testing.assert_allclose(logits(tmp_path / "out"), attached, atol=1e-5)
    assert np.abs(logits(run / "model") - attached).max() > 1e-3
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    capsys.readouterr()
    assert command.main(["export", str(run), str(tmp_path / "out"), "--format", "hf"]) == 2
    assert "exists" in capsys.readouterr().err


def test_folded_export_with_unscaled_values(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("checkpoints"))
    kept = adapter.load(run / "adapter")
    assert kept.config["scale"] != 1
    adapter.save(run / "adapter", kept._replace(config=kept.config | {"scale_sparse": False}))
    assert command.main(["export", str(run), str(tmp_path / "out"), "--format", "hf"]) == 0
    attached = logits(run / "model", kept.adapter.replace(scale_sparse=False))
    np.testing.assert_allclose(logits(tmp_path / "out"), attached, atol=1e-5)


def test_export_with_factors_keeps_weights_and_adapter(finished, tmp_path):
    run, out = finished[0], tmp_path / "out"
    assert command.main(["export", str(run), str(out), "--format", "hf", "--factors"]) == 0
    assert (out / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, adapter.load(out / "adapter")[:4], adapter.load(run / "adapter")[:4])


def test_overwrite_replaces_exports_alone(finished, tmp_path, capsys):
    """An export in any format; not a folder with another file, nor a model that something else wrote, nor the run's own."""
    run, out = finished[0], tmp_path / "out"
    arguments = ["export", str(run), str(out), "--overwrite", "--format"]
    for form in ("peft", "hf"):
        assert command.main([*arguments, form]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors"}.isdisjoint(file.name for file in out.iterdir())
    (out / "notes.txt").write_text("mine")
    shutil.copytree(run / "model", tmp_path / "model")
    before = (tmp_path / "model/config.json").stat().st_mtime_ns
    capsys.readouterr()
    for place, line in (
        (out, "'notes.txt' in it is not a file that this command"),
        (tmp_path / "model", "no README.md of"),
    ):
        assert command.main(["export", str(run), str(place), "--overwrite"]) == 2
        assert line in capsys.readouterr().err
    assert (tmp_path / "model/config.json").stat().st_mtime_ns == before
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_folded_export_opens_in_transformers(finished, tmp_path):
    """transformers on torch computes equal logits."""
    torch = pytest.importorskip("torch")
    from transformers import BertForSequenceClassification

    assert command.main(["export", str(finished[0]), str(tmp_path / "out"), "--format", "hf"]) == 0
    theirs = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x).long() for name, x in tiny.batch().items()}).logits.numpy()
    np.testing.assert_allclose(logits(tmp_path / "out"), expected, atol=1e-5)


@pytest.fixture(scope="module")
def cut(finished_run):
    """The folder of a finished run with pruned heads and neurons, and its results."""
    run = finished_run("structured") / "run"
    return run, json.loads((run / folders.METRICS).read_text())


def test_evaluate_a_pruned_model(cut, capsys):
    assert command.main(["evaluate", str(cut[0])]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(cut[1]["final"], abs=1e-6)


def test_exports_of_a_pruned_model_have_the_tuned_logits(cut, tmp_path, capsys):
    """Compact, and with zeros for the heads: the logits equal those of the model with attached updates."""
    run = cut[0]
    attached = logits(run / "model", adapter.load(run / "adapter").adapter)
    for form in ("hf", "compact"):
        assert command.main(["export", str(run), str(tmp_path / form), "--format", form]) == 0
        np.testing.assert_allclose(logits(tmp_path / form), attached, atol=1e-5)
    small, large = (hf.load_pretrained(tmp_path / form) for form in ("compact", "hf"))
    assert small[0].config.widths == {"heads": (2,), "neurons": (24,)}
    assert large[0].config == hf.load_pretrained(run.parent / "base")[0].config.with_widths(neurons=(24,))
    assert "kept_heads" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    kept, kept_by_hf = (kept_units.read(tmp_path / form) for form in ("compact", "hf"))
    assert kept_units.difference(kept_by_hf, {"neurons": kept["neurons"]}) is None
    value = np.asarray(large[1]["encoder"]["layer_0"]["attention"]["value"]["kernel"])
    np.testing.assert_array_equal((value != 0).any(0), np.repeat(kept["heads"]["layer_0"], 8))
    assert command.main(["export", str(run), str(tmp_path / "x"), "--format", "compact", "--factors"]) == 0
    np.testing.assert_allclose(
        logits(tmp_path / "x", adapter.load(tmp_path / "x" / "adapter").adapter), attached, atol=1e-5
    )
    capsys.readouterr()
    assert command.main(["export", str(run), str(tmp_path / "y"), "--format", "hf", "--factors"]) == 2
    assert "use it with --format compact" in capsys.readouterr().err


def test_compact_export_of_an_unpruned_model_is_refused(finished, tmp_path, capsys):
    assert command.main(["export", str(finished[0]), str(tmp_path / "out"), "--format", "compact"]) == 2
    assert "has pruned no heads or neurons" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pruned_model_with_files_of_another_is_refused(cut, finished, tmp_path, capsys):
    """Weights of one pruned model with the config, or the adapter, of another model."""
    spoilt = tmp_path / "run"
    shutil.copytree(cut[0], spoilt, ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copyfile(finished[0] / "model" / "config.json", spoilt / "model" / "config.json")
    assert command.main(["evaluate", str(spoilt)]) == 2
    assert "kept.safetensors: the model has the widths" in capsys.readouterr().err
    (spoilt / "model" / "kept.safetensors").unlink()
    assert command.main(["evaluate", str(spoilt)]) == 2
    assert "were heads or neurons pruned? then take the config.json" in capsys.readouterr().err
    shutil.rmtree(spoilt / "model")
    shutil.copytree(finished[0] / "model", spoilt / "model")
    assert command.main(["evaluate", str(spoilt)]) == 2
    assert "were pruned differently: the heads of layer 0 differ" in capsys.readouterr().err
    (spoilt / "adapter" / "kept.safetensors").unlink()
    assert command.main(["evaluate", str(spoilt)]) == 2
    assert "the adapter belongs to another model, or to the same model pruned differently" in capsys.readouterr().err


def refused(run, out, capsys, *words):
    """Assert that every verb that loads the model and its adapter fails with one line."""
    for arguments in (["evaluate", str(run)], ["export", str(run), str(out)]):
        assert command.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        for word in words:
            assert str(word) in said
    assert not out.exists()


def rolled(folder):
    """Replace the kept units by others of equal widths."""
    units = kept_units.read(folder)
    kept_units.write(folder, jax.tree.map(lambda flags: np.roll(flags, 1), units))


@pytest.mark.parametrize("part", ["model", "adapter"])
def test_kept_units_of_another_pruning_are_refused(cut, tmp_path, capsys, part):
    """Equal shapes: only kept.safetensors distinguishes the model, or the adapter, from another pruning."""
    spoilt = tmp_path / "run"
    shutil.copytree(cut[0], spoilt, ignore=shutil.ignore_patterns("checkpoints"))
    rolled(spoilt / part)
    words = (spoilt / "adapter", spoilt / "model", "were pruned differently: the heads of layer 0 differ")
    refused(spoilt, tmp_path / "out", capsys, *words)


def test_adapter_of_the_dense_model_is_refused(cut, finished, tmp_path, capsys):
    spoilt = tmp_path / "run"
    shutil.copytree(cut[0], spoilt, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    made = adapter.load(finished[0] / "adapter")
    (spoilt / "adapter").mkdir()
    adapter.save(spoilt / "adapter", made._replace(masks={}))
    refused(spoilt, tmp_path / "out", capsys, "were pruned differently: the heads of layer 0 differ")


def test_kept_units_of_other_widths_are_refused(cut, tmp_path, capsys):
    """kept.safetensors of another run, with other widths than config.json; also without an adapter."""
    spoilt = tmp_path / "run"
    shutil.copytree(cut[0], spoilt, ignore=shutil.ignore_patterns("checkpoints"))
    kept_units.write(spoilt / "model", {"heads": {"layer_0": np.array([True, False, False])}})
    refused(spoilt, tmp_path / "out", capsys, spoilt / "model" / "kept.safetensors", "the kept units give")
    with pytest.raises(dsee_jax.errors.InputError, match="this file and config.json must be written together"):
        dsee_jax.load_pretrained(spoilt / "model")


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_export_of_a_pruned_model_opens_in_transformers(cut, tmp_path):
    """transformers on torch computes equal logits from the full size with zeros."""
    torch = pytest.importorskip("torch")
    from transformers import BertForSequenceClassification

    assert command.main(["export", str(cut[0]), str(tmp_path / "out"), "--format", "hf"]) == 0
    theirs = BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x).long() for name, x in tiny.batch().items()}).logits.numpy()
    attached = logits(cut[0] / "model", adapter.load(cut[0] / "adapter").adapter)
    np.testing.assert_allclose(attached, expected, atol=1e-5)


def test_report_prints_stages_and_sparsity(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("checkpoints"))
    assert command.main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    for text in ("after pruning", "50.0% of the prunable kernels", str(run / "adapter")):
        assert text in said.replace("\n", " ")


def test_report_is_one_object_for_programs(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("checkpoints"))
    assert command.main(["report", str(run), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["runs"][0]["results"] == finished[1]
    assert figures["page"] == str(run / "report.html")
    assert all(pathlib.Path(file).is_file() for file in figures["runs"][0]["pictures"].values())


@pytest.mark.smoke
def test_inspect_prints_and_writes_layers(finished, tmp_path, capsys):
    run = finished[0]
    arguments = ["inspect", str(run.parent / "base"), str(run / "model"), "--json", str(tmp_path / "comparison.json")]
    assert command.main(arguments) == 0
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["layer"] for row in comparison["layers"]] == ["0", "other"]
    assert 0.4 < comparison["layers"][0]["zeros"] < 0.6
    assert "only after: bert.pooler.dense.bias" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "report", "export"])
def test_unfinished_run_is_named(tmp_path, capsys, verb):
    assert command.main([verb, str(tmp_path), *(["out", "--format", "hf"] if verb == "export" else [])]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(tmp_path) in said


def test_run_without_its_adapter_is_not_evaluated(finished, tmp_path, capsys):
    """The updates are part of the model; without them the metrics would be wrong."""
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("adapter", "checkpoints"))
    assert command.main(["evaluate", str(tmp_path / "run")]) == 2
    assert "adapter_config.json: missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", '{"task": 1, "stages": 2}', '{"stages": [], "final": {"x": "y"}}', "[]", "{"])
def test_report_of_other_json_is_one_line(tmp_path, capsys, text):
    (tmp_path / "metrics.json").write_text(text)
    assert command.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "metrics.json" in said.err
    assert (said.err.count("\n"), said.out) == (1, "")


def test_report_says_which_pictures_are_not_drawn(finished, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "metrics.jsonl").write_text('{"stage": "tune", "loss": 1}\n')
    (run / "sparsity.png").mkdir()
    assert command.main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert "curves not drawn" in said
    assert f"sparsity not drawn: {run / 'sparsity.png'}: Is a directory" in said
