"""Recipes: their YAML, settings and vocabularies, read, evaluated and refused."""

import os
import pathlib
import re

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from dsee_jax.errors import InputError
from dsee_jax.runtime import strict_yaml
from merge.method import Option
from merge.methods import METHODS
from merge.recipes import recipe, settings

LINEAR = """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.9}}
"""
TIES = """
merge_method: ties
base_model: base
models:
  - model: base
  - model: a
    parameters:
      weight: [0, 0.5, 1]
      density:
        - {filter: mlp, value: 1e-1}
        - {value: [0.2, 0.4]}
  - model: b
    parameters: {weight: "1e-3", density: 0.5}
parameters: {normalize: true, int8_mask: no, lambda: 0.8}
dtype: float32
out_dtype: bfloat16
tokenizer:
  source: union
  tokens:
    <pad>: {source: {kind: zero}, force: true}
    <a>: {source: a}
    "5": {source: {kind: model_token, model: b, token_id: 3}}
  pad_to_multiple_of: 64
chat_template: auto
"""
SLICES = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3], parameters: {scale: 0.5}}]
    parameters: {scale: 1}
"""
FLOAT = Option(float, None, "")


@pytest.fixture
def read_recipe(tmp_path):
    """A function that reads a recipe from its text."""

    def read(text):
        path = tmp_path / "recipe.yml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return recipe.read(path)

    return read


def constant(value):
    return (settings.Choice(None, (value,)),)


def test_models_form_is_one_slice(read_recipe):
    """Each model has its weight; no other parameter is set."""
    parsed = read_recipe(LINEAR)
    assert (parsed.name, parsed.base_model, parsed.origin, parsed.sliced) == ("linear", None, "a", False)
    assert parsed.references == ("a", "b")
    (part,) = parsed.slices
    assert part.base is None
    assert [entry.parameters for entry in part.models] == [{"weight": constant(0.3)}, {"weight": constant(0.9)}]


def test_every_key_is_read(read_recipe):
    """Gradients, filters, numbers that YAML 1.1 reads as text, types and tokens."""
    parsed = read_recipe(TIES)
    (part,) = parsed.slices
    assert part.base.model == "base"
    assert [entry.key for entry in part.models] == ["models[1]", "models[2]"]
    assert part.models[0].parameters == {
        "weight": (settings.Choice(None, (0, 0.5, 1)),),
        "density": (settings.Choice("mlp", (0.1,)), settings.Choice(None, (0.2, 0.4))),
    }
    assert part.models[1].parameters == {"weight": constant(0.001), "density": constant(0.5)}
    assert parsed.parameters == {"normalize": constant(True), "int8_mask": constant(False), "lambda": constant(0.8)}
    assert (parsed.dtype, parsed.out_dtype, parsed.chat_template) == ("float32", "bfloat16", "auto")
    assert parsed.tokenizer.source == "union"
    assert parsed.tokenizer.pad_to_multiple_of == 64
    assert parsed.tokenizer.tokens == {
        "<pad>": {"source": {"kind": "zero"}, "force": True},
        "<a>": {"source": "a"},
        "5": {"source": {"kind": "model_token", "model": "b", "token_id": 3}},
    }


def test_slices_have_their_layers_and_parameters(read_recipe):
    parsed = read_recipe(SLICES)
    assert parsed.sliced
    assert [part.models[0].layers for part in parsed.slices] == [(0, 2), (1, 3)]
    assert parsed.slices[1].parameters == {"scale": constant(1)}
    assert parsed.slices[1].models[0].parameters == {"scale": constant(0.5)}
    assert parsed.slices[1].models[0].key == "slices[1].sources[0]"


def test_base_counts_as_a_model_for_methods_without_a_base(read_recipe):
    """As in mergekit, an unlisted base joins the models, with the weight from the top."""
    parsed = read_recipe(
        "merge_method: linear\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}"
    )
    assert [entry.model for entry in parsed.slices[0].models] == ["a", "b", "c"]
    assert (parsed.slices[0].base, parsed.origin) == (None, "c")


def test_keys_beyond_mergekit_are_read(read_recipe, tmp_path):
    """RankMean, seeds, LiNeS over another method, and statistics files beside the recipe."""
    both = "base_model: t\nmodels: [{model: a}, {model: b}]\n"
    parsed = read_recipe("merge_method: rankmean\nparameters: {unit: tensor, order: reversed, ties: order}\n" + both)
    assert parsed.parameters == {"unit": constant("tensor"), "order": constant("reversed"), "ties": constant("order")}
    parsed = read_recipe("merge_method: dare_ties\nseed: 7\nparameters: {weight: 1, density: 0.5}\n" + both)
    assert parsed.parameters["seed"] == constant(7)
    parsed = read_recipe(
        "merge_method: lines\nparameters: {method: sce, select_topk: 0.5, alpha: 0.1, beta: 0.9}\n" + both
    )
    assert set(parsed.parameters) == {"method", "select_topk", "alpha", "beta"}
    (tmp_path / "s.safetensors").touch()
    parsed = read_recipe("merge_method: regmean\nmodels: [{model: a, statistics: s.safetensors}]")
    assert parsed.slices[0].models[0].statistics == tmp_path / "s.safetensors"


def test_module_default_is_the_whole_model(read_recipe):
    """The form that mergekit writes into its model cards; the module's parameters come before the top's."""
    flat = read_recipe(SLICES + "parameters: {scale: 4}")
    body = SLICES.split("slices:")[1].replace("\n", "\n    ")
    parsed = read_recipe(
        "merge_method: passthrough\nmodules:\n  default:\n    slices:" + body
        + "\n    parameters: {scale: [{filter: mlp, value: 3}]}\nparameters: {scale: 4}"
    )  # fmt: skip
    assert [part.models[0].layers for part in parsed.slices] == [part.models[0].layers for part in flat.slices]
    assert [part.parameters for part in parsed.slices] == [part.parameters for part in flat.slices]
    assert parsed.slices[0].models[0].key == "modules.default.slices[0].sources[0]"
    assert parsed.parameters["scale"] == (settings.Choice("mlp", (3,)), settings.Choice(None, (4,)))


def test_reference_may_be_a_mapping(read_recipe):
    """mergekit writes mappings into some model cards."""
    text = """
merge_method: task_arithmetic
base_model: {model: {path: t}}
models:
  - model: {model: {path: org/a, revision: main}, lora: {path: org/b}}
  - model: {model: b, lora: null}
parameters: {weight: 1}
tokenizer_source: {model: {path: t}}
"""
    parsed = read_recipe(text)
    assert parsed.references == ("t", "org/a@main+org/b", "b")
    assert parsed.tokenizer.source == "t"


IGNORED = [
    ("merge_method: model_stock\nparameters: {weight: 1, dtype: x}\n" + "base_model: t\nmodels: [{model: a}, {model: b}]",
     ["weight in parameters has no effect: model_stock does not use it",
      "dtype in parameters has no effect: it stands at the top of a recipe"]),
    (LINEAR.replace("linear", "model_stock\nbase_model: t"),
     ["weight in models[0].parameters, models[1].parameters has no effect: model_stock does not use it"]),
    (LINEAR + "name: mine\ndescription: x\ntags: [a]", []),
    (LINEAR + "parameters: {int8_mask: true, lambda: 1}",
     [f"{key} in parameters has no effect: linear does not use it" for key in ("int8_mask", "lambda")]),
    (TIES.replace("density: 0.5", "density: 0.5, lambda: 0.8, int8_mask: yes"), []),
    (LINEAR + "normalize: false", ["normalize has no effect: parameters of the method stand under 'parameters:'"]),
    (LINEAR + "random_seed: 3", ["random_seed has no effect: it is a flag of mergekit-yaml, not a key of a recipe"]),
    (LINEAR.replace("model: a,", "model: a, layer_range: [0, 1],"), ["models[0].layer_range has no effect: mergekit"]),
    (SLICES.replace("- sources: [{model: a", "- residual_weight: 1\n    sources: [{model: a", 1), ["slices[0].residual"]),
    (SLICES.replace("- sources: [{model: a", "- base_model: c\n    sources: [{model: a", 1), ["slices[0].base_model has no"]),
    (LINEAR + "seed: 3", ["seed has no effect: linear draws no random numbers"]),
]  # fmt: skip
"""Recipes that mergekit runs, and the notes on the parts without effect."""


@pytest.mark.parametrize(("text", "notes"), IGNORED, ids=[str(number) for number in range(len(IGNORED))])
def test_keys_without_effect_are_noted(read_recipe, text, notes):
    found = read_recipe(text).notes
    assert len(found) == len(notes)
    for line, expected in zip(found, notes, strict=True):
        assert line.startswith(expected)
        assert "\n" not in line


def test_given_seed_replaces_the_seed_of_the_recipe(tmp_path):
    path = tmp_path / "recipe.yml"
    text = "merge_method: dare_ties\nbase_model: t\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    for own in ("", "seed: 3\n", "parameters: {seed: 3}\n"):
        path.write_text(text + own)
        parsed = recipe.read(path, seed=5)
        assert parsed.parameters["seed"] == constant(5)
        assert recipe.resolved(parsed)["parameters"]["seed"] == 5


def test_slice_may_be_empty(read_recipe):
    """As in mergekit; its models give the tensors around the layers."""
    parsed = read_recipe(SLICES + "  - sources: [{model: c, layer_range: [2, 2]}]\n")
    assert [part.models[0].layers for part in parsed.slices] == [(0, 2), (1, 3), (2, 2)]


def test_aliases_and_merge_keys_are_read_as_pyyaml_reads_them():
    """Also a key that is written beside the merge key or comes from two mappings, and equal repeated keys."""
    text = """
first: &first {a: 1, b: [&x 2, *x]}
second: &second {b: 3, c: 4}
over: {<<: *first, a: 9}
under: {a: 9, <<: *first}
list: {<<: [*first, *second], d: 5}
twice:
  <<: *first
  <<: *second
again: *second
a: *x
"""
    content = strict_yaml.parse("r", text).content
    assert content == yaml.safe_load(text)
    assert strict_yaml.parse("r", "a: {b: 1}\na: {b: 1}\n---\n...\n").content == {"a": {"b": 1}}
    assert yaml.safe_load(strict_yaml.dump(content)) == content
    assert "*" not in strict_yaml.dump(content)


def test_further_key_may_hold_the_anchor_of_an_alias(read_recipe):
    text = "common: &common {weight: 0.5}\n" + LINEAR.replace("{weight: 0.3}", "*common")
    assert read_recipe(text).slices[0].models[0].parameters == {"weight": constant(0.5)}
    with pytest.raises(InputError, match="common is unknown"):
        read_recipe("common: &common {weight: 0.5}\n" + LINEAR)


@pytest.mark.parametrize("name", ["linear", "linear_slices", "slerp", "task_arithmetic", "ties"])
def test_mergekit_recipe_is_read(shared, name):
    """The recipes of the reference outputs."""
    parsed = recipe.read(shared / "goldens/mergekit" / f"{name}.yml")
    assert parsed.name == name.removesuffix("_slices")
    assert parsed.dtype == "float32"
    assert len(parsed.slices[0].models) == (1 if name == "slerp" else 2)


@pytest.mark.parametrize(
    ("setting", "name", "t", "expected"),
    [
        (0.5, "x", 0.7, 0.5),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 0.5, 0.3, 0.7, 1], "x", 0.25, 0.5),
        ([0, 0.5, 0.3, 0.7, 1], "x", 0.375, 0.4),
        ([0, 0.5, 0.3, 0.7, 1], "x", 1, 1),
        ([2], "x", 0.3, 2),
        ({"filter": "mlp", "value": 1}, "layers.0.mlp.weight", 0, 1),
        ({"filter": "mlp", "value": 1}, "layers.0.attn.weight", 0, None),
        ({"filter": "*", "value": 1}, "layers.0.attn.weight", 0, 1),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 9}], "mlp", 0.5, 2),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 9}, {"filter": "norm", "value": 5}], "norm", 0.5, 9),
        ("1e-3", "x", 0, 0.001),
        (["1e-3", "3e-3"], "x", 0.5, 0.002),
    ],
)
def test_setting_has_its_value_at_a_depth(setting, name, t, expected):
    """Gradients are interpolated; the first matching filter gives the value; None if no filter matches."""
    checked = settings.read("r", "p", {"weight": setting}, {"weight": FLOAT}, "linear", {})["weight"]
    value = settings.evaluate("r", checked, FLOAT, name, t)
    assert value == (expected if expected is None else pytest.approx(expected, abs=1e-15))


def test_gradient_of_booleans_is_not_interpolated():
    """A gradient of booleans takes its last value only at the last layer."""
    option = Option(bool, None, "")
    checked = settings.read("r", "p", {"normalize": [True, False]}, {"normalize": option}, "linear", {})["normalize"]
    assert [settings.evaluate("r", checked, option, "x", t) for t in (0, 0.99, 1)] == [True, True, False]


def test_lookup_takes_the_first_level_with_a_value():
    """After the levels comes the default; without a default the lookup is an error."""
    near = {"weight": (settings.Choice("mlp", (1.0,)),)}
    far = {"weight": (settings.Choice("norm", (2.0,)),)}
    levels = [("models[0].parameters", near), ("parameters", far)]
    assert settings.lookup("r", "weight", FLOAT, levels, "mlp.norm", 0) == 1
    assert settings.lookup("r", "weight", FLOAT, levels, "norm", 0) == 2
    assert settings.lookup("r", "weight", FLOAT._replace(default=3.0), levels, "head", 0) == 3
    with pytest.raises(InputError, match=r"r: models\[0\].parameters.weight and parameters.weight gives no value"):
        settings.lookup("r", "weight", FLOAT, levels, "head", 0)


BASED = "base_model: t\nmodels: [{model: a}, {model: b}]\n"
SOURCES = "sources: [{model: a, layer_range: [0, 2]}]"
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(25))
PAIR = "{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 2]}]}"
BAD = [
    ("", "is empty"),
    ("- a\n- b", "holds list of 2 at its top"),
    ("merge_method: [", "not YAML"),
    ("a: 1\na: 2", "line 2: the key 'a' is repeated with another value"),
    ("a: &x [*x]", "the alias *x refers to no value before it"),
    ("a: *x", "the alias *x refers to no value before it"),
    ("a: &x b\n*x : 1", "a key is an alias"),
    ("a: &x [1]\n<<: *x", "line 2: << is no mapping"),
    ("a: &x b\n<<: *x", "line 2: << is no mapping"),
    (BOMB, "more than 1,000,000 values, aliases expanded"),
    (f"a: &x {'9' * 200}\nb: &y [{'*x, ' * 100}]\nc: &z [{'*y, ' * 100}]\nd: [{'*z, ' * 100}]", "values, aliases"),
    ("a: &x " + "[" * 20 + "]" * 20 + "\nb: " + "[" * 20 + "*x" + "]" * 20, "nested deeper than 32"),
    ("a: !!python/object:os.system {}", "tag"),
    ("a: !!python/name:os.system x", "tag"),
    ("a: 1\n---\nb: 2", "a second document begins; expected one: write each recipe into a file of its own"),
    ("base_model: b\ngate_mode: hidden\nexperts: []", "gate_mode belongs to a recipe of mergekit-moe"),
    ("experts: []", "its OUT_DIR can then be a model"),
    ("genome: {models: [a]}\ntasks: []", "merge by the recipe that it writes"),
    ("layer_slices: []", "write the layers as slices"),
    ("model: a\ndonor: b", "donor belongs to a recipe of mergekit-tokensurgeon"),
    ("? [a]\n: 1", "a key is a list or a mapping"),
    ("[" * 100_000, "nested deeper than 32"),
    ("{a: " * 100_000, "nested deeper than 32"),
    ("- " * 100_000, "nested deeper than 32"),
    ("a: " + "9" * 10_000, "not YAML"),
    (LINEAR.replace("0.3", "0x" + "f" * 10_000), "a number of more than 400 characters"),
    (LINEAR.replace("0.3", "1" + ":1" * 10_000), "a number of more than 400 characters"),
    (LINEAR.replace("0.3", "0x" + "f" * 390), "models[0].parameters.weight is"),
    ("? " * 100_000, "a key is a list or a mapping"),
    (b"\xff\xfe\x00", "not UTF-8"),
    (b"a: \x00", "not YAML"),
    (LINEAR.replace("0.3", "!!int ''"), "not YAML"),
    ("#" * 1_000_001, "larger than 1,000,000 bytes"),
    ("models: []", "merge_method is missing"),
    ("merge_method: 3", "merge_method is 3; expected text"),
    ("merge_method: liner", "did you mean 'linear'?"),
    (LINEAR + "modules: {}", "modules has none; only 'default'"),
    (LINEAR + "modules: []", "modules is list of 0; expected 'default:' with models or slices"),
    (LINEAR + "modules: {default: {models: []}}", "has 'modules' beside 'models' or 'slices'"),
    ("merge_method: linear\nmodules: {text: {}, vision: {}}", "modules has text, vision; only 'default'"),
    ("merge_method: linear\nmodules: {default: {modls: []}}", "modules.default.modls is unknown (did you mean 'models'?)"),
    ("merge_method: linear\nmodules: {default: {models: [{model: a}]}}", "modules.default.models[0].parameters.weight is"),
    (LINEAR + "dtyp: float32", "recipe.yml: dtyp is unknown (did you mean 'dtype'?)"),
    (LINEAR + "dtype: float8", "dtype is 'float8'"),
    (LINEAR + "dtype: 32", "dtype is 32; expected text"),
    (LINEAR + "out_dtype: int64", "out_dtype is 'int64'"),
    (LINEAR + "slices: []", "has both 'models' and 'slices'"),
    ("merge_method: linear", "has neither 'models' nor 'slices'"),
    ("merge_method: linear\nmodels: []", "models is an empty list"),
    ("merge_method: linear\nmodels: {a: 1}", "models is dict of 1; expected a list"),
    ("merge_method: linear\nmodels: [a]", "models[0] is 'a'; expected '- model: ...'"),
    ("merge_method: linear\nmodels: [{parameters: {weight: 1}}]", "models[0] lacks 'model'"),
    ("merge_method: linear\nmodels: [{model: 5}]", "models[0].model is 5; expected text"),
    ("merge_method: linear\nmodels: [{model: ' '}]", "models[0].model is ' '"),
    ("merge_method: linear\nmodels: [{model: {path: a}}]", "models[0].model is dict of 1; expected text, or a mapping"),
    ("merge_method: linear\nmodels: [{model: {model: {revision: a}}}]", "models[0].model.model is dict of 1; expected"),
    ("merge_method: linear\nmodels: [{model: {model: a, override_architecture: b}}]", "architecture is not supported"),
    ("merge_method: linear\nmodels: [{model: a, wieght: 1}]", "models[0].wieght is unknown"),
    ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "models[0].parameters.weight is missing for 'a'"),
    ("merge_method: linear\nmodels: [{model: a}]", "models[0].parameters.weight is missing for 'a'"),
    ("merge_method: karcher\nmodels: [{model: a}, {model: a}]", "models[1].model is 'a', as models[0]"),
    ("merge_method: linear\nmodels: [{model: a, statistics: f, parameters: {weight: 1}}]", "statistics has no effect"),
    ("merge_method: fisher\nmodels: [{model: a, parameters: {weight: 1}}]", "models[0] lacks 'statistics'"),
    (LINEAR + "parameters: 5", "parameters is 5; expected parameters such as"),
    (LINEAR + "parameters: {densty: 1}", "parameters.densty is a parameter of no method (did you mean 'density'?)"),
    (LINEAR + "parameters: {lamda: 1}", "parameters.lamda is a parameter of no method (did you mean 'lambda'?)"),
    (LINEAR + "chat_template: chatmll", "chat_template is 'chatmll' (did you mean 'chatml'?)"),
    (LINEAR + "chat_template: nothing", "expected one of auto, chatml,"),
    (LINEAR + "input_model_parameters: []", "input_model_parameters: it is not supported"),
    (LINEAR + "parameters: {normalize: 2}", "parameters.normalize is 2; expected true or false"),
    (LINEAR + "parameters: {normalize: {}}", "parameters.normalize lacks 'value'"),
    (LINEAR.replace("0.3", "heavy"), "models[0].parameters.weight is 'heavy'; expected a number"),
    (LINEAR.replace("0.3", ""), "models[0].parameters.weight is empty"),
    (LINEAR.replace("0.3", "true"), "models[0].parameters.weight is True"),
    (LINEAR.replace("0.3", ".nan"), "models[0].parameters.weight is nan"),
    (LINEAR.replace("0.3", "1e999"), "models[0].parameters.weight is '1e999'"),
    (LINEAR.replace("0.3", "1.0e40"), "models[0].parameters.weight is 1e+40; expected a number, of at most 3.40282e+38"),
    (LINEAR.replace("0.3", "[]"), "models[0].parameters.weight is an empty list"),
    (LINEAR.replace("0.3", "[1, [2]]"), "models[0].parameters.weight[1] is list of 1"),
    (LINEAR.replace("0.3", "[1, {value: 2}]"), "models[0].parameters.weight[0] is 1 among entries with filters"),
    (LINEAR.replace("0.3", "[{filtr: x, value: 2}]"), "weight[0].filtr is unknown (did you mean 'filter'?)"),
    (LINEAR.replace("0.3", "[{filter: 5, value: 2}]"), "weight[0].filter is 5"),
    (LINEAR.replace("0.3", "[{filter: mlp}]"), "weight[0] lacks 'value'"),
    (LINEAR.replace("weight: 0.3", "weight: 0.3, normalize: no"), "models[0].parameters.normalize is False, and True for the"),
    (TIES.replace("density: 0.5", "density: 0.5, lambda: 1"), "models[2].parameters.lambda is 1.0, and 0.8 for the whole"),
    (TIES.replace("density: 0.5", "densty: 0.5"), "models[2].parameters.densty is a parameter of no method (did you mean"),
    (TIES.replace("density: 0.5", "density: 1.5"), "models[2].parameters.density is 1.5; expected a number in [0, 1]"),
    (TIES.replace("density: 0.5", "density: -0.5"), "models[2].parameters.density is -0.5; expected a number in [0, 1]"),
    (TIES.replace("[0.2, 0.4]", "[0.2, -0.4]"), "models[1].parameters.density[1].value[1] is -0.4"),
    (TIES.replace("base_model: base\n", ""), "base_model is missing; ties measures"),
    (TIES + "tokenizer_source: base", "has both 'tokenizer' and 'tokenizer_source'"),
    (TIES.replace("of: 64", "of: 0"), "tokenizer.pad_to_multiple_of is 0"),
    (TIES.replace("{kind: zero}", "{kind: nil}"), "tokenizer.tokens.'<pad>'.source.kind is 'nil'"),
    (TIES.replace(", token_id: 3", ""), "tokenizer.tokens.'5'.source is incomplete"),
    (TIES.replace("force: true", "forse: true"), "tokenizer.tokens.'<pad>'.forse is unknown (did you mean 'force'?)"),
    ("merge_method: slerp\nparameters: {t: 0.5}\n" + BASED, "models has 2 model(s) besides the base; slerp takes 1"),
    ("merge_method: slerp\nbase_model: t\nmodels: [{model: a}]", "parameters.t is missing; slerp needs it"),
    ("merge_method: model_stock\nbase_model: t\nmodels: [{model: a}]", "model_stock takes at least 2"),
    ("merge_method: rankmean\nparameters: {order: up}\n" + BASED, "parameters.order is 'up'; expected one of"),
    ("merge_method: dare_ties\nseed: -3\nparameters: {weight: 1}\n" + BASED, "seed is -3"),
    ("merge_method: dare_ties\nseed: 3\nparameters: {weight: 1, seed: 3}\n" + BASED, "has both 'seed' and 'parameters.seed'"),
    ("merge_method: lines\nparameters: {method: tie}\n" + BASED, "parameters.method: lines over 'tie' (did you mean 'ties'?)"),
    ("merge_method: lines\nparameters: {method: 5}\n" + BASED, "parameters.method is 5; expected text"),
    ("merge_method: lines\nparameters: {method: sce}\n" + BASED, "parameters.alpha is missing; lines needs it"),
    (SLICES.replace("[0, 2]", "[2, 0]"), "slices[0].sources[0].layer_range is [2, 0]"),
    (SLICES.replace("[0, 2]", "[0, 1.5]"), "slices[0].sources[0].layer_range is [0, 1.5]"),
    (SLICES.replace("[0, 2]", "2"), "slices[0].sources[0].layer_range is [2]"),
    (SLICES.replace(", layer_range: [0, 2]", ""), "slices[0].sources[0] lacks 'layer_range'"),
    (SLICES.replace("[0, 2]", "[3, 3]").replace("[1, 3]", "[0, 0]"), "slices have no layers"),
    (SLICES.replace(SOURCES, "source: []"), "slices[0].source is unknown"),
    (SLICES.replace(SOURCES, "parameters: {}"), "slices[0] lacks 'sources'"),
    (f"merge_method: sce\nbase_model: t\nslices: [{{{SOURCES}}}]", "slices[0].sources lack the base 't'"),
    (f"merge_method: karcher\nslices: [{PAIR}]", "slices[0].sources take different numbers of layers"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_recipe_is_one_line_that_names_the_key(read_recipe, text, message):
    """The line begins with the recipe's path."""
    with pytest.raises(InputError) as caught:
        read_recipe(text)
    line = str(caught.value)
    assert re.match(r"\S*recipe\.yml: ", line)
    assert message in line
    assert "\n" not in line
    assert len(line) < 1000


def test_unreadable_recipe_is_refused(tmp_path):
    """The path does not exist, or is a folder, a device without end, or a pipe that nobody writes."""
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "none.yml", "No such file"),
        (tmp_path, "is a folder"),
        (pathlib.Path("/dev/zero"), "is a device or a pipe"),
        (tmp_path / "pipe", "is a device or a pipe"),
    ):
        with pytest.raises(InputError, match=message):
            recipe.read(path)


WORDS = ["merge_method", "models", "slices", "sources", "model", "parameters", "weight", "density", "filter", "value"]
WORDS += ["base_model", "layer_range", "dtype", "tokenizer", "tokens", "source", "kind", "seed", "normalize", "method"]
WORDS += [*METHODS, "a", "base", "zero", "float32", "1e-3", "*", "mlp", "<<", "\n", "é", ""]
SCALARS = st.one_of(
    st.sampled_from(WORDS), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=20), st.dates()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=15,
)
YAMLISH = st.text(alphabet=st.sampled_from([*"abms:-[]{}&*!?|>#'\"%@`,.~<0123456789 \n\t\r\x00\x85é"]), max_size=200)


def mutated(draw, node):
    """A recipe with one value replaced or added."""
    if isinstance(node, dict) and node and draw(st.integers(0, 3)):
        key = draw(st.sampled_from([*node]))
        return {**node, key: mutated(draw, node[key])}
    if isinstance(node, list) and node and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(node) - 1))
        return [*node[:place], mutated(draw, node[place]), *node[place + 1 :]]
    if isinstance(node, dict) and draw(st.booleans()):
        return {**node, draw(st.sampled_from(WORDS)): draw(VALUES)}
    return draw(VALUES)


@st.composite
def mutations(draw):
    return yaml.safe_dump(
        mutated(draw, yaml.safe_load(draw(st.sampled_from([LINEAR, TIES, SLICES])))), allow_unicode=True
    )


@st.composite
def spliced_texts(draw):
    text = draw(st.sampled_from([LINEAR, TIES, SLICES]))
    start, stop = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
    return text[:start] + draw(YAMLISH) + text[stop:]


def fuzz(examples):
    """A test over ``examples`` texts: each is read as a recipe, or refused in one line."""

    @hypothesis.settings(
        max_examples=examples, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
    )
    @hypothesis.given(
        text=YAMLISH | VALUES.map(yaml.safe_dump) | mutations() | spliced_texts() | st.binary(max_size=100)
    )
    def test(read_recipe, text):
        try:
            assert read_recipe(text).slices
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 2000  # noqa: PT017

    return test


test_any_text_gives_a_recipe_or_an_input_error = fuzz(300)
test_any_of_10000_texts_gives_a_recipe_or_an_input_error = pytest.mark.exhaustive(fuzz(10_000))


@hypothesis.given(VALUES)
@hypothesis.settings(max_examples=100, deadline=None)
def test_document_equals_pyyaml(value):
    """Scalars and structure equal PyYAML's, except that dates and keys are text."""

    def expected(node):
        if isinstance(node, dict):
            return {key: expected(child) for key, child in node.items()}
        if isinstance(node, list):
            return [expected(child) for child in node]
        return node if isinstance(node, (str, int, float, bool)) or node is None else str(node)

    hypothesis.assume("1e" not in repr(value))
    text = yaml.safe_dump(value, allow_unicode=True)
    assert repr(strict_yaml.parse("r", text).content) == repr(expected(yaml.safe_load(text)))
