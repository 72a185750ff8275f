"""Random recipes: a plan or one line, in bounded time, and not one file."""

import copy
import json
import os
import random

import numpy as np
import pytest
import yaml

import checkpoints
import decoders
import fuzz
from dsee_jax.runtime import strict_yaml
from merge import pipeline
from merge.methods import METHODS
from merge.outputs import card
from merge.planning import describe
from merge.recipes import recipe
from merge.streaming import engine

pytestmark = pytest.mark.exhaustive

SEEDS, EACH = 20, 100

KEYS = (
    *(
        "merge_method",
        "models",
        "slices",
        "sources",
        "model",
        "base_model",
        "parameters",
        "weight",
        "density",
        "normalize",
    ),
    *(
        "layer_range",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "tokenizer",
        "source",
        "tokens",
        "chat_template",
        "seed",
    ),
    *("lambda", "filter", "value", "statistics", "unit", "modules", "name", "force", "pad_to_multiple_of", "kind"),
    *fuzz.TEXTS,
)

REFERENCES = (
    *("base", "model_0", "model_1", "other", "wide", "empty", "file", "loop", "none", "adapter", "weights", "link"),
    *(
        "model_0+adapter",
        "model_0+empty",
        "model_0@main",
        "model_0+model_1",
        "org/none",
        "./base",
        "base/",
        "base/config.json",
    ),
)

PARTS = (
    *(
        b"&a ",
        b"*a",
        b"<<: *a",
        b"\n---\n",
        b"\t",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\x00",
        b"!!binary ",
        b"!!python/name:os.system ",
    ),
    *(
        b"? ",
        b"- ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"'",
        b'"',
        b"#",
        b"|",
        b">",
        b"%YAML 1.2\n",
        b"@",
        b"`",
        b"\r",
        b"\xc2\x85",
    ),
    *(b"[" * 500, b"a: &a [" + b"1, " * 50 + b"]\nb: &b [" + b"*a, " * 50 + b"]\nc: [" + b"*b, " * 50 + b"]\n"),
)


def example(option):
    """Return a value of an option of a method."""
    return option.choices[0] if option.choices else {float: 0.5, int: 1, bool: True, str: "x"}[option.kind]


def recipes():
    """Yield valid recipes of every form."""
    for name, method in METHODS.items():
        own = {key: {"epsilon": 0.05, "gamma": 0.05}.get(key, example(option)) for key, option in method.each.items()}
        shared = {key: example(option) for key, option in method.shared.items() if option.default is None}
        if "method" in method.shared:
            shared["method"] = "ties"
        fields = {
            "merge_method": name,
            "models": [
                {"model": f"model_{number}", "parameters": dict(own)}
                for number in range(1 if method.models[1] == 1 else 2)
            ],
            "parameters": shared,
        }
        if method.base != "none":
            fields["base_model"] = "base"
        yield fields
    yield {
        "merge_method": "linear",
        "dtype": "float32",
        "slices": [
            {"sources": [{"model": "model_0", "layer_range": [0, 2], "parameters": {"weight": [0, 1]}}]},
            {
                "sources": [
                    {"model": "model_1", "layer_range": [1, 3], "parameters": {"weight": {"filter": "mlp", "value": 1}}}
                ]
            },
        ],
        "parameters": {"normalize": False, "weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]},
    }
    tokenizer = {
        "source": "union",
        "pad_to_multiple_of": 8,
        "tokens": {"<new>": {"source": {"kind": "zero"}, "force": True}},
    }
    models = [{"model": "llama_0", "parameters": {"weight": 1}}, {"model": "llama_1", "parameters": {"weight": 1}}]
    yield {"merge_method": "linear", "models": models, "tokenizer": tokenizer, "chat_template": "auto"}
    yield {"merge_method": "linear", "models": models, "tokenizer_source": "base", "out_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and other things that a recipe may name."""
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoints.family(folder)
    checkpoints.save(folder / "wide", {"model.embed_tokens.weight": np.ones((3, 2), "f4")})
    checkpoints.save(folder / "other", checkpoints.load(folder / "base"), checkpoints.CONFIG | {"model_type": "other"})
    for number in range(2):
        decoders.write(folder / f"llama_{number}", seed=number, **decoders.VARIANTS["llama"])
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to("loop")
    (folder / "link").symlink_to("base")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (folder / "weights").mkdir()
    os.symlink("/dev/zero", folder / "weights" / "model.safetensors")
    (folder / "weights" / "config.json").write_text("{}")
    return folder


def value(generator):
    return generator.choice(REFERENCES) if generator.randrange(3) == 0 else fuzz.value(generator)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_recipe_is_a_plan_or_one_line(folder, monkeypatch, seed):
    """An accepted recipe can also be described, written beside its model and read again."""
    monkeypatch.chdir(folder)
    generator, valid, path = random.Random(seed), list(recipes()), folder / "recipe.yml"
    path.write_text("")
    names = fuzz.tree(folder).keys()
    accepted = 0
    for number in range(EACH):
        raw = copy.deepcopy(generator.choice(valid))
        if number >= 2:
            raw = fuzz.changed(generator, raw, values=value, keys=KEYS)
        text = yaml.safe_dump(
            raw, allow_unicode=bool(number % 2), default_flow_style=generator.choice((None, True, False))
        )
        data = text.encode()
        if number >= 2 and generator.randrange(3) == 0:
            data = fuzz.scrambled(generator, data, PARTS)
        path.write_bytes(data)
        error = fuzz.refusal(lambda: written(pipeline.read(path)), f"seed {seed}, input {number}: {data!r}")
        accepted += error is None
        assert number >= 2 or not error or "statistics" in error, (seed, number, data, error)
    assert fuzz.tree(folder).keys() == names
    assert accepted


def written(ready):
    describe.describe(ready.plan, engine.layout(ready.plan).items())
    resolved = recipe.resolved(ready.recipe)
    again = strict_yaml.parse("written", card.recipe_text(resolved, dict.fromkeys(ready.files, "00"))).content
    assert json.dumps(again) == json.dumps(resolved)
    card.card(
        "x",
        method=ready.recipe.name,
        about="",
        models=ready.plan.models,
        base=ready.recipe.base_model,
        recipe=ready.recipe.text,
        options=resolved.get("parameters") or {},
        digests=dict.fromkeys(ready.files, "00"),
    )
