"""Whatever is wrong with a recipe or its models: one line that names it, exit status 2, no output."""

import json

import numpy as np
import pytest

import checkpoints
from dsee_jax.ckpt import tensors
from merge import __main__ as command

CASES = {}


def case(*words):
    """Register what spoils a sound merge; the words must be in the line."""

    def add(function):
        CASES[function.__name__] = (function, words)
        return function

    return add


def respell(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def header(file, change):
    """Rewrite the header of a safetensors file."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    said = json.loads(raw[8 : 8 + size])
    change(said)
    text = json.dumps(said).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@case("'model.layers.1.mlp.weight'", "[32, 16]", "[33, 16]", "model_1")
def mismatched_shapes(folder, trees):
    trees[2]["model.layers.1.mlp.weight"] = np.zeros((33, 16), "float32")
    checkpoints.save(folder / "model_1", trees[2])


@case("vocab_size", "tokenizer_source", "50", "51")
def another_vocabulary(folder, trees):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        trees[2][name] = np.zeros((51, 16), "float32")
    checkpoints.save(folder / "model_1", trees[2], checkpoints.CONFIG | {"vocab_size": 51})


@case("'model.layers.2.norm.weight'", "model_1")
def a_missing_tensor(folder, trees):
    del trees[2]["model.layers.2.norm.weight"]
    checkpoints.save(folder / "model_1", trees[2])


@case("'model.layers.3.norm.weight'", "model_1")
def a_surplus_tensor(folder, trees):
    trees[2]["model.layers.3.norm.weight"] = np.zeros(16, "float32")
    checkpoints.save(folder / "model_1", trees[2])


@case("model_type", "tiny", "other", "model_1")
def another_architecture(folder, trees):
    checkpoints.save(folder / "model_1", trees[2], checkpoints.CONFIG | {"model_type": "other"})


@case("'lm_head.weight'", "model_0", "--allow-nonfinite")
def an_infinity(folder, trees):
    trees[1]["lm_head.weight"][7, 7] = -np.inf
    checkpoints.save(folder / "model_0", trees[1])


@case("model_1", "model.safetensors", "whole")
def a_corrupt_header(folder, trees):
    file = folder / "model_1" / tensors.SINGLE
    file.write_bytes(file.read_bytes()[:8] + b"[" + file.read_bytes()[9:])


@case("model_1", "model.safetensors", "whole")
def a_truncated_file(folder, trees):
    file = folder / "model_1" / tensors.SINGLE
    file.write_bytes(file.read_bytes()[:-100])


@case("model_1", "model.safetensors", "whole")
def a_length_without_end(folder, trees):
    file = folder / "model_1" / tensors.SINGLE
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


@case("model_1", "F8_E4M3", "lm_head.weight")
def a_type_that_is_not_read(folder, trees):
    def change(said):
        said["lm_head.weight"] |= {"dtype": "F8_E4M3", "shape": [50, 64]}

    header(folder / "model_1" / tensors.SINGLE, change)


@case("model.safetensors.index.json", "model_1")
def an_index_to_elsewhere(folder, trees):
    (folder / "model_1" / tensors.SINGLE).rename(folder / "model.safetensors")
    placed = dict.fromkeys(trees[2], "../model.safetensors")
    (folder / "model_1" / tensors.INDEX).write_text(json.dumps({"weight_map": placed}))


@case("pytorch_model.bin", "pickle", "safetensors")
def a_pickle(folder, trees):
    (folder / "model_1" / tensors.SINGLE).rename(folder / "model_1" / "pytorch_model.bin")


@case("model_1", "config.json")
def no_config(folder, trees):
    (folder / "model_1" / "config.json").unlink()


@case("model_9", "recipe")
def no_such_model(folder, trees):
    respell(folder / "recipe.yml", "model_1", "model_9")


@case("recipe.yml", "weight", "sum to zero", "normalize")
def weights_that_sum_to_zero(folder, trees):
    respell(folder / "recipe.yml", "weight: 0.5", "weight: 0")


@case("recipe.yml", "models[0].parameters.density", "0", "(0, 1]")
def a_density_of_nothing(folder, trees):
    respell(folder / "recipe.yml", "density: 0.5", "density: 0")


@case("recipe.yml", "models[0].parameters.density", "1.5", "(0, 1]")
def a_density_of_more_than_all(folder, trees):
    respell(folder / "recipe.yml", "density: 0.5", "density: 1.5")


@case("recipe.yml", "models[0].parameters.densty", "did you mean 'density'?")
def a_misspelt_parameter(folder, trees):
    respell(folder / "recipe.yml", "density", "densty")


@case("recipe.yml", "merge_metod", "did you mean 'merge_method'?")
def a_misspelt_key(folder, trees):
    respell(folder / "recipe.yml", "merge_method", "merge_metod")


@case("recipe.yml", "tise", "did you mean 'ties'?")
def a_misspelt_method(folder, trees):
    respell(folder / "recipe.yml", "merge_method: ties", "merge_method: tise")


@case("recipe.yml", "base_model")
def no_base(folder, trees):
    respell(folder / "recipe.yml", "base_model: base\n", "")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", [False, True], ids=["run", "plan"])
def test_one_line_and_no_output(tmp_path, capsys, name, plan):
    spoil, words = CASES[name]
    trees = checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, "ties", each={"weight": 0.5, "density": 0.5})
    assert command.main([str(path), str(tmp_path / "out"), "--plan"]) == 0
    capsys.readouterr()
    spoil(tmp_path, trees)
    status = command.main([str(path), str(tmp_path / "out"), *["--plan"] * plan])
    said = capsys.readouterr()
    if plan and name == "an_infinity":
        assert status == 0, "only headers are read"
        return
    assert status == 2
    assert said.out == ""
    (line,) = said.err.strip().split("\n")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()
