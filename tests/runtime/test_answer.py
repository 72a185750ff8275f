"""``--json``: stdout is one strict JSON object, and lines for a person are elsewhere."""

import argparse
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from dsee_jax import __main__ as verbs
from dsee_jax.errors import InputError
from dsee_jax.runtime import answer
from merge import __main__ as merges


def strict(text):
    """Return the only object in a text; NaN and infinities fail."""

    def refused(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refused)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models A and B, where the change of a tensor is infinite, and a recipe."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("AB"):
        tiny.bert(folder / name, seed=seed, num_hidden_layers=1)
    weights = load_file(folder / "A" / "model.safetensors")
    zeros = {name: np.zeros_like(value) if "pooler" in name else value for name, value in weights.items()}
    save_file(zeros, folder / "A" / "model.safetensors", metadata={"format": "pt"})
    (folder / "recipe.yaml").write_text("merge_method: rankmean\nbase_model: A\nmodels: [{model: A}, {model: B}]\n")
    return folder


COMMANDS = {
    "inspect": (verbs.main, ["inspect", "A", "B", "--json"], "layers"),
    "compare": (merges.main, ["compare", "A", "B", "--json"], "rows"),
    "plan of a merge": (merges.main, ["recipe.yaml", "OUT", "--plan", "--json"], "tensors"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_is_one_object(name, folder, monkeypatch, capsys):
    main, words, key = COMMANDS[name]
    monkeypatch.chdir(folder)
    assert main(words) == 0
    figures = strict(capsys.readouterr().out)
    assert figures[key]
    assert main([*words, "found.json"]) == 0
    assert json.loads((folder / "found.json").read_text()) == figures
    assert "{" not in capsys.readouterr().out


def test_plan_of_a_merge_lists_every_tensor(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert merges.main(["recipe.yaml", "OUT", "--plan", "--json"]) == 0
    figures = strict(capsys.readouterr().out)
    names = set(load_file(folder / "A" / "model.safetensors"))
    assert {tensor["name"] for tensor in figures["tensors"]} == names
    assert sum(file["tensors"] for file in figures["files"]) == len(names)
    assert sum(file["bytes"] for file in figures["files"]) == figures["written_bytes"]
    assert (figures["bases"], figures["models"]) == (["A"], ["B"])


def test_remarks_are_on_stderr_and_tables_left_out(capsys):
    both = [answer.Answer(), answer.Answer(printed=True)]
    for each in both:
        each.show("a table")
        each.say("a remark\x1b")
        each.give({"x": float("nan")})
    said = capsys.readouterr()
    assert said.out == 'a table\na remark\\x1b\n{"x": null}\n'
    assert said.err == "a remark\\x1b\n"


def test_file_that_cannot_be_written_is_refused(tmp_path):
    parser = argparse.ArgumentParser()
    answer.arguments(parser)
    with pytest.raises(InputError, match="--json .* is a folder; name a file"):
        answer.wanted(parser.parse_args(["--json", str(tmp_path)]))
