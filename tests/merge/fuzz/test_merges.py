"""Random complete merges: the numbers of an independent merge in NumPy, in one folder, and again from the written recipe."""

import json
import random

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import checkpoints
import fuzz
from dsee_jax.ckpt import tensors
from merge import __main__ as command

pytestmark = pytest.mark.exhaustive

SEEDS, EACH = 20, 10

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
PRECISION = {"float32": 1e-5, "float64": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
NAMES = (
    *(
        "model.embed.weight",
        "model.layers.0.mlp.weight",
        "model.layers.1.mlp.weight",
        "model.layers.10.attn.bias",
        "norm",
    ),
    *(
        "a",
        "A",
        "é.weight",
        "[/x]",
        "a|b`c`",
        "a\nb",
        "\x1b[1m",
        "🙂",
        "x" * 300,
        "..",
        "../x",
        "/",
        "a b",
        "\u202e",
        "{}",
        "0",
    ),
)


def family(generator, folder):
    """Write models of random tensors; return ``[base, model_0, ...]`` and the type of the floats."""
    numbers = np.random.default_rng(generator.randrange(2**32))
    kind = generator.choice(list(FLOATS))
    shapes = {
        name: tuple(
            generator.choice((1, 1, 2, 3, 17, 0 if generator.randrange(6) == 0 else 5))
            for _ in range(generator.randrange(4))
        )
        for name in generator.sample(NAMES, generator.randrange(1, 9))
    }
    if generator.randrange(4) == 0:
        shapes["large"] = (generator.choice((1, 3, 700)), 3001)
    trees = []
    for _ in range(generator.randrange(2, 6)):
        trees.append(
            {name: np.asarray(numbers.normal(size=shape) * 3).astype(FLOATS[kind]) for name, shape in shapes.items()}
        )
        if generator.randrange(2) or "steps" in trees[0]:
            trees[-1]["steps"] = np.arange(3) + len(trees)
            trees[0].setdefault("steps", np.arange(3))
    for tree in trees:
        if "steps" in trees[0]:
            tree.setdefault("steps", np.arange(3) - 5)
    size = generator.choice(("5GB", "5GB", "100", "1", "20kB"))
    for number, tree in enumerate(trees):
        checkpoints.save(folder / ("base" if number == 0 else f"model_{number - 1}"), tree, {"model_type": "x"}, size)
    return trees, kind


def weights(generator, names):
    """Return a weight as a recipe writes it, and as ``{name: number}``."""
    plain = generator.choice((1, 0.5, 0.25, 2, 1.5, -0.125))
    if generator.randrange(2):
        return plain, dict.fromkeys(names, plain)
    part = generator.choice(sorted(names))[:3]
    if not part.strip() or "\n" in part:
        return plain, dict.fromkeys(names, plain)
    special = generator.choice((0.75, 3, 0.3))
    rules = [{"filter": part, "value": special}, {"value": plain}]
    return rules, {name: special if part in name else plain for name in names}


def merged(trees, method, each, normalize, scale):
    """Return the merge in float64; tensors that are not floats are the first model's, or the base's."""
    base, *models = trees
    result = {}
    for name, first in (models[0] if method == "linear" else base).items():
        if first.dtype.kind == "i":
            result[name] = first.astype(np.float64)
            continue
        values = [tree[name].astype(np.float64) for tree in models]
        center = 0 if method == "linear" else base[name].astype(np.float64)
        total = sum(weight[name] for weight in each) if normalize else 1
        result[name] = center + scale * sum(w[name] * (v - center) for w, v in zip(each, values, strict=True)) / total
    return result


@pytest.mark.parametrize("seed", range(SEEDS))
def test_merge_equals_numpy(tmp_path, capsys, seed):
    generator = random.Random(seed)
    for number in range(EACH):
        folder = tmp_path / str(number)
        folder.mkdir()
        trees, kind = family(generator, folder)
        method = generator.choice(("linear", "task_arithmetic"))
        normalize, scale = generator.random() < 0.5, generator.choice((1.0, 0.5, -0.25))
        written, each = zip(*(weights(generator, trees[0].keys()) for _ in trees[1:]), strict=True)
        if any(abs(sum(weight[name] for weight in each)) < 0.2 for name in trees[0]):
            normalize = False
        fields = {
            "merge_method": method,
            "models": [
                {"model": str(folder / f"model_{index}"), "parameters": {"weight": weight}}
                for index, weight in enumerate(written)
            ],
            "parameters": {"normalize": normalize} | ({"lambda": scale} if method != "linear" else {}),
        }
        if method != "linear":
            fields["base_model"] = str(folder / "base")
        if generator.randrange(2):
            fields[generator.choice(("dtype", "out_dtype"))] = kind = generator.choice(
                ("float32", "float16", "bfloat16")
            )
        (folder / "recipe.yml").write_text(yaml.safe_dump(fields, allow_unicode=True))
        before, size = fuzz.tree(folder), generator.choice(("5GB", "100", "1", "20kB"))
        with fuzz.limited(60):
            status = command.main([str(folder / "recipe.yml"), str(folder / "out"), "--max-shard-size", size])
        assert status == 0, (seed, number, capsys.readouterr().err)
        after = fuzz.tree(folder)
        new = {path for path in after if path not in before}
        assert all(path.startswith(str(folder / "out")) for path in new), (seed, number, new)
        assert all(after[path] == size for path, size in before.items()), (seed, number)
        compare(
            folder / "out",
            merged(trees, method, each, normalize, scale if method != "linear" else 1),
            kind,
            (seed, number),
        )
        written = str(folder / "out" / "merge_recipe.yml")
        assert command.main([written, str(folder / "again"), "--max-shard-size", size]) == 0, (seed, number)
        for file in (folder / "again").glob("*.safetensors"):
            assert file.read_bytes() == (folder / "out" / file.name).read_bytes(), (seed, number)


def compare(folder, expected, kind, where):
    result = {}
    for file in folder.glob("*.safetensors"):
        result |= load_file(file)
    if (folder / tensors.INDEX).exists():
        assert json.loads((folder / tensors.INDEX).read_text())["weight_map"].keys() == result.keys(), where
    assert result.keys() == expected.keys(), where
    for name, array in result.items():
        wanted = expected[name]
        assert array.shape == wanted.shape, (where, name)
        assert array.dtype == (np.int64 if name == "steps" else FLOATS[kind]), (where, name)
        bound = PRECISION[kind] * (np.abs(wanted) + 10)
        assert np.all(np.abs(array.astype(np.float64) - wanted) <= bound), (where, name)
