"""Bad recipes and models: one line that names the error, exit status 2, and no output."""

import json

import numpy as np
import pytest

import checkpoints
from dsee_jax.ckpt import tensors
from merge import __main__ as command

CASES = {}


def case(*words):
    """Register a function that damages a valid merge, and the words of the error."""

    def add(function):
        CASES[function.__name__] = (function, words)
        return function

    return add


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def rewrite_header(file, change):
    """Write the header of a safetensors file again, changed in place by ``change``."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + size])
    change(fields)
    text = json.dumps(fields).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@case("'model.layers.1.mlp.weight'", "[32, 16]", "[33, 16]", "model_1")
def mismatched_shapes(folder, trees):
    trees[2]["model.layers.1.mlp.weight"] = np.zeros((33, 16), "float32")
    checkpoints.save(folder / "model_1", trees[2])


@case("vocab_size", "tokenizer_source", "50", "51")
def different_vocabulary(folder, trees):
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        trees[2][name] = np.zeros((51, 16), "float32")
    checkpoints.save(folder / "model_1", trees[2], checkpoints.CONFIG | {"vocab_size": 51})


@case("'model.layers.2.norm.weight'", "model_1")
def missing_tensor(folder, trees):
    del trees[2]["model.layers.2.norm.weight"]
    checkpoints.save(folder / "model_1", trees[2])


@case("'model.layers.3.norm.weight'", "model_1")
def surplus_tensor(folder, trees):
    trees[2]["model.layers.3.norm.weight"] = np.zeros(16, "float32")
    checkpoints.save(folder / "model_1", trees[2])


@case("model_type", "tiny", "other", "model_1")
def different_architecture(folder, trees):
    checkpoints.save(folder / "model_1", trees[2], checkpoints.CONFIG | {"model_type": "other"})


@case("'lm_head.weight'", "model_0", "--allow-nonfinite")
def infinite_weight(folder, trees):
    trees[1]["lm_head.weight"][7, 7] = -np.inf
    checkpoints.save(folder / "model_0", trees[1])


@case("model_1", "model.safetensors", "complete")
def corrupt_header(folder, trees):
    file = folder / "model_1" / tensors.SINGLE
    file.write_bytes(file.read_bytes()[:8] + b"[" + file.read_bytes()[9:])


@case("model_1", "model.safetensors", "complete")
def truncated_file(folder, trees):
    file = folder / "model_1" / tensors.SINGLE
    file.write_bytes(file.read_bytes()[:-100])


@case("model_1", "model.safetensors", "complete")
def huge_header_length(folder, trees):
    file = folder / "model_1" / tensors.SINGLE
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


@case("model_1", "F8_E4M3", "lm_head.weight")
def unsupported_dtype(folder, trees):
    def change(fields):
        fields["lm_head.weight"] |= {"dtype": "F8_E4M3", "shape": [50, 64]}

    rewrite_header(folder / "model_1" / tensors.SINGLE, change)


@case("model.safetensors.index.json", "model_1")
def index_outside_its_folder(folder, trees):
    (folder / "model_1" / tensors.SINGLE).rename(folder / "model.safetensors")
    placed = dict.fromkeys(trees[2], "../model.safetensors")
    (folder / "model_1" / tensors.INDEX).write_text(json.dumps({"weight_map": placed}))


@case("pytorch_model.bin", "pickle", "safetensors")
def pickled_weights(folder, trees):
    (folder / "model_1" / tensors.SINGLE).rename(folder / "model_1" / "pytorch_model.bin")


@case("base", "no tensors")
def models_without_tensors(folder, trees):
    for name in ("base", "model_0", "model_1"):
        (folder / name / tensors.SINGLE).write_bytes((2).to_bytes(8, "little") + b"{}")


@case("model_1", "config.json")
def missing_config(folder, trees):
    (folder / "model_1" / "config.json").unlink()


@case("model_9", "recipe")
def missing_model(folder, trees):
    replace(folder / "recipe.yml", "model_1", "model_9")


@case("recipe.yml", "weights sum to 0", "normalize")
def weights_of_a_mean_sum_to_zero(folder, trees):
    replace(folder / "recipe.yml", "weight: 0.5", "weight: 0")
    replace(folder / "recipe.yml", "merge_method: ties", "merge_method: linear")
    replace(folder / "recipe.yml", "base_model: base\n", "")


@case("recipe.yml", "models[0].parameters.density", "1.5", "[0, 1]")
def density_above_one(folder, trees):
    replace(folder / "recipe.yml", "density: 0.5", "density: 1.5")


@case("recipe.yml", "models[0].parameters.densty", "did you mean 'density'?")
def misspelt_parameter(folder, trees):
    replace(folder / "recipe.yml", "density", "densty")


@case("recipe.yml", "merge_metod", "did you mean 'merge_method'?")
def misspelt_key(folder, trees):
    replace(folder / "recipe.yml", "merge_method", "merge_metod")


@case("recipe.yml", "tise", "did you mean 'ties'?")
def misspelt_method(folder, trees):
    replace(folder / "recipe.yml", "merge_method: ties", "merge_method: tise")


@case("recipe.yml", "chat_template", "did you mean 'llama3'?")
def misspelt_chat_template(folder, trees):
    replace(folder / "recipe.yml", "merge_method: ties", "merge_method: ties\nchat_template: lama3")


@case("recipe.yml", "parameters.lambda is 0.9", "1.0 for the whole merge")
def lambda_of_one_model(folder, trees):
    replace(folder / "recipe.yml", "density: 0.5", "density: 0.5\n    lambda: 0.9")


@case("recipe.yml", "base_model")
def missing_base(folder, trees):
    replace(folder / "recipe.yml", "base_model: base\n", "")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", [False, True], ids=["run", "plan"])
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, name, plan):
    damage, words = CASES[name]
    trees = checkpoints.family(tmp_path)
    path = checkpoints.recipe(tmp_path, "ties", each={"weight": 0.5, "density": 0.5})
    assert command.main([str(path), str(tmp_path / "out"), "--plan"]) == 0
    capsys.readouterr()
    damage(tmp_path, trees)
    status = command.main([str(path), str(tmp_path / "out"), *["--plan"] * plan])
    printed = capsys.readouterr()
    if plan and name == "infinite_weight":
        assert status == 0, "only headers are read"
        return
    assert status == 2
    assert printed.out == ""
    (line,) = printed.err.strip().split("\n")
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()
