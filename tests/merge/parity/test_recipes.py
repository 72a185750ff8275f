"""Recipes in the style of public model cards: equal to mergekit 0.1.5 in float32, and runnable again as written beside OUT."""

import json
import pathlib
import warnings

import ml_dtypes
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, models

import checkpoints
import decoders
from merge import __main__ as command
from merge.recipes import chat_templates

GRADIENT = "[0, 0.25, 0.5, 0.75, 1]"
SAME = {
    "linear": """
models:
  - model: a
    parameters: {weight: 0.3}
  - model: b
    parameters: {weight: 0.7}
merge_method: linear
dtype: float32
""",
    "linear with an unlisted base, unnormalised, negative": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: -0.4}}
base_model: base
merge_method: linear
parameters: {weight: 0.5, normalize: false, int8_mask: true}
dtype: float32
""",
    "slerp of the notebooks": """
slices:
  - sources:
      - model: base
        layer_range: [0, 4]
      - model: a
        layer_range: [0, 4]
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""",
    "slerp with a parameter that it does not use": """
models: [{model: base}, {model: b}]
merge_method: slerp
base_model: base
parameters: {t: 0.4, normalize: true, dtype: bfloat16}
dtype: float32
""",
    "task arithmetic": """
models:
  - {model: a, parameters: {weight: 0.8}}
  - {model: b, parameters: {weight: -0.5}}
  - {model: base}
merge_method: task_arithmetic
base_model: base
parameters: {lambda: 1.2, normalize: false}
dtype: float32
""",
    "task arithmetic normalised by zero": """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: [{filter: mlp, value: -0.5}, {value: 0.5}]}}
merge_method: task_arithmetic
base_model: base
parameters: {normalize: true}
dtype: float32
""",
    "ties": """
models:
  - model: base
  - {model: a, parameters: {density: 0.5, weight: 0.5}}
  - {model: b, parameters: {density: 0.5, weight: 0.3}}
  - {model: c, parameters: {density: 0.3, weight: 0.9}}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float32
""",
    "ties with gradients and filters": """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true, lambda: 0.9}
dtype: float32
""",
    "ties from a density and a weight of zero": f"""
models:
  - {{model: a, parameters: {{density: {GRADIENT}, weight: {GRADIENT}}}}}
  - {{model: b, parameters: {{density: {GRADIENT}, weight: {GRADIENT}}}}}
merge_method: ties
base_model: base
parameters: {{rescale: true}}
dtype: float32
""",
    "dare_ties of density one": """
models:
  - {model: a, parameters: {density: 1, weight: 0.6}}
  - {model: b, parameters: {density: 1.0, weight: 0.4}}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true, lambda: 1.1}
dtype: float32
""",
    "dare_linear of densities zero and one": """
models:
  - {model: a, parameters: {density: 1, weight: 0.6}}
  - {model: b, parameters: {density: 0, weight: 0.6}}
merge_method: dare_linear
base_model: base
parameters: {normalize: true}
dtype: float32
""",
    "dare_linear with opposite weights": """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: -0.5}}
merge_method: dare_linear
base_model: base
parameters: {normalize: true}
dtype: float32
""",
    "della with lambda beside each model": """
models:
  - {model: a, parameters: {density: 1, weight: 1, lambda: 0.9}}
  - {model: b, parameters: {density: 1, weight: 1, lambda: 0.9}}
merge_method: della
base_model: base
parameters: {density: 1, weight: 1, lambda: 0.9, normalize: true, int8_mask: true}
dtype: float32
tokenizer_source: base
name: tiny-generation-2
""",
    "della_linear from a density of zero": """
models:
  - {model: a, parameters: {density: [0, 0, 0, 1], weight: 0.7}}
  - {model: b, parameters: {density: [0, 0, 0, 1], weight: 0.4}}
merge_method: della_linear
base_model: base
parameters: {epsilon: 0}
dtype: float32
""",
    "breadcrumbs": """
models:
  - {model: a, parameters: {density: 0.9, gamma: 0.01, weight: 0.5}}
  - {model: b, parameters: {density: 0.7, gamma: 0.05, weight: 0.5}}
merge_method: breadcrumbs
base_model: base
dtype: float32
""",
    "breadcrumbs of small tensors": """
models:
  - {model: a, parameters: {density: 0.05, gamma: 0.2, weight: 1}}
  - {model: b, parameters: {density: 0.02, gamma: 0.9, weight: 1}}
merge_method: breadcrumbs
base_model: base
parameters: {rescale: true, normalize: true}
dtype: float32
""",
    "breadcrumbs_ties": """
models:
  - {model: a, parameters: {weight: 0.9}}
  - {model: b, parameters: {weight: 0.3}}
merge_method: breadcrumbs_ties
base_model: base
parameters: {density: 0.6, gamma: 0.02, lambda: 0.8}
dtype: float32
""",
    "model_stock with weights": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 1.0}}
  - {model: c}
merge_method: model_stock
base_model: base
parameters: {normalize: true}
dtype: float32
""",
    "model_stock by rows": """
models: [{model: a}, {model: b}]
merge_method: model_stock
base_model: base
parameters: {filter_wise: true}
dtype: float32
""",
    "sce": """
models: [{model: a}, {model: b}, {model: c}]
merge_method: sce
base_model: base
parameters: {select_topk: 0.5, normalize: true, lambda: 0.9, int8_mask: true}
dtype: float32
""",
    "sce of everything": """
models: [{model: base}, {model: b}, {model: c}]
merge_method: sce
base_model: base
dtype: float32
""",
    "nearswap": """
models: [{model: base}, {model: a}]
merge_method: nearswap
base_model: base
parameters: {t: 0.002}
dtype: float32
""",
    "nuslerp": """
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.6}}
merge_method: nuslerp
dtype: float32
""",
    "nuslerp of changes by rows": """
models:
  - {model: a, parameters: {weight: [0.2, 0.8]}}
  - {model: b, parameters: {weight: 0.5}}
merge_method: nuslerp
base_model: base
parameters: {nuslerp_row_wise: true, nuslerp_flatten: false}
dtype: float32
""",
    "multislerp": """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.8}}
merge_method: multislerp
base_model: base
dtype: float32
""",
    "karcher": """
models: [{model: a}, {model: b}, {model: c}]
merge_method: karcher
parameters: {max_iter: 20, tol: 1e-6}
dtype: float32
""",
    "arcee_fusion": """
models: [{model: a}]
merge_method: arcee_fusion
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float32
tokenizer_source: base
""",
    "ram": """
models: [{model: sparse_a}, {model: sparse_b}, {model: c}]
merge_method: ram
base_model: base
dtype: float32
""",
    "ram with a large epsilon": """
models: [{model: a}, {model: b}]
merge_method: ram
base_model: base
parameters: {epsilon: 0.01}
dtype: float32
""",
    "ramplus_tl": """
models: [{model: sparse_a}, {model: sparse_b}]
merge_method: ramplus_tl
base_model: base
parameters: {r: 0.5, alpha: 0.7}
dtype: float32
""",
    "passthrough of slices": """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
""",
    "passthrough with scales and filters": """
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
        parameters:
          scale:
            - {filter: o_proj, value: 0.5}
            - {filter: down_proj, value: 0.25}
            - value: 1
  - sources: [{model: a, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
""",
    "passthrough with an empty last slice": """
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources: [{model: b, layer_range: [4, 4]}]
merge_method: passthrough
dtype: float32
""",
    "slices of pairs": """
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [1, 0.5]}}
      - {model: b, layer_range: [1, 3], parameters: {weight: 0.5}}
  - sources:
      - {model: b, layer_range: [2, 4], parameters: {weight: 0.2}}
      - {model: c, layer_range: [2, 4]}
    parameters: {weight: 0.6}
merge_method: linear
dtype: float32
""",
    "modules default": """
base_model: base
dtype: float32
merge_method: ties
modules:
  default:
    slices:
    - sources:
      - layer_range: [0, 4]
        model: a
        parameters: {density: 0.8, weight: 0.7}
      - layer_range: [0, 4]
        model: b
        parameters: {density: 0.7, weight: 0.5}
      - layer_range: [0, 4]
        model: base
    parameters: {lambda: 0.9}
parameters: {normalize: 1.0, int8_mask: 1.0, lambda: 0.1}
""",
    "references as mappings": """
models:
  - model: {model: {path: a}}
    parameters: {weight: 0.6}
  - model: {model: {path: b}}
    parameters: {weight: 0.2}
base_model: {model: {path: base}}
merge_method: task_arithmetic
dtype: float32
""",
    "anchors and merge keys": """
common: &common {density: 0.5, weight: 0.5}
models:
  - {model: a, parameters: {<<: *common, weight: 0.9}}
  - {model: b, parameters: *common}
merge_method: ties
base_model: base
dtype: float32
""",
    "types of their own": """
models: [{model: half_a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
merge_method: linear
""",
    "another written type": """
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
merge_method: linear
dtype: float32
out_dtype: bfloat16
""",
    "union of vocabularies": """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
base_model: base
merge_method: linear
parameters: {weight: 0}
dtype: float32
tokenizer: {source: union}
chat_template: chatml
""",
    "misplaced keys": """
models:
  - {model: a, layer_range: [0, 4], parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
merge_method: linear
normalize: false
random_seed: 3
description: the keys above are ignored
dtype: float32
""",
}
"""Recipes whose tensors equal mergekit's."""

RANDOM = {
    "dare_ties": """
models:
  - {model: a, parameters: {density: 0.53, weight: 0.4}}
  - {model: b, parameters: {density: 0.53, weight: 0.3}}
merge_method: dare_ties
base_model: base
parameters: {int8_mask: true}
dtype: float32
""",
    "dare_linear without rescaling": """
models:
  - {model: a, parameters: {density: 0.6, weight: 0.6}}
  - {model: b, parameters: {density: 0.4, weight: 0.5}}
merge_method: dare_linear
base_model: base
parameters: {rescale: false}
dtype: float32
""",
    "della": """
models:
  - {model: a, parameters: {density: 0.5, weight: 0.5, epsilon: 0.2}}
  - {model: b, parameters: {density: 0.6, weight: 0.3}}
merge_method: della
base_model: base
parameters: {epsilon: 0.1, lambda: 0.9, normalize: true}
dtype: float32
""",
}
"""Recipes that draw random numbers, whose changes have mergekit's distribution."""


def rms(values):
    return float(np.sqrt(np.mean(np.square(np.float64(values)))))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A folder with the models of the recipes."""
    folder = tmp_path_factory.mktemp("family")
    fields = decoders.config(
        num_hidden_layers=4, vocab_size=40, architectures=["LlamaForCausalLM"], tie_word_embeddings=False
    )
    base, generator = decoders.weights(fields), np.random.default_rng(0)
    for name in ("base", "a", "b", "c", "half_a", "sparse_a", "sparse_b"):
        noise = {key: 0.02 * generator.normal(size=value.shape) for key, value in base.items()}
        if name.startswith("sparse"):
            noise = {key: change * (generator.uniform(size=change.shape) < 0.1) for key, change in noise.items()}
        kind = ml_dtypes.bfloat16 if name.startswith("half") else np.float32
        model = base if name == "base" else {key: base[key] + noise[key] for key in base}
        checkpoints.save(folder / name, {key: value.astype(kind) for key, value in model.items()}, fields)
        # mergekit needs ids without gaps, and adds the tokens of several models in any order.
        words = [f"w{number}" for number in range(38)] + (["own"] if name == "a" else [])
        words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
        words.save(str(folder / name / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def ours(folder, recipe, out):
    """Merge in ``folder`` by the text or the path of a recipe; return the tensors."""
    path = recipe
    if isinstance(recipe, str):
        path = folder / "recipe.yml"
        path.write_text(recipe)
    assert command.main([str(path), str(out)]) == 0
    return checkpoints.load(out)


@pytest.fixture
def theirs(family, tmp_path, monkeypatch):
    """A function that merges by the text of a recipe with mergekit, and returns the tensors."""
    reason = "needs mergekit 0.1.5 (see the parity step of .ci/run)"
    config = pytest.importorskip("mergekit.config", reason=reason)
    merging, options = (pytest.importorskip(f"mergekit.{name}", reason=reason) for name in ("merge", "options"))

    def run(text):
        monkeypatch.chdir(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A model card would look the models up on the hub.
            given = options.MergeOptions(quiet=True, random_seed=1, write_model_card=False)
            parsed = config.MergeConfiguration.model_validate(yaml.safe_load(text))
            merging.run_merge(parsed, str(tmp_path / "theirs"), given)
        return checkpoints.load(tmp_path / "theirs")

    return run


@pytest.mark.parity
@pytest.mark.parametrize("name", SAME)
def test_recipe_equals_mergekit(family, theirs, tmp_path, name):
    expected, merged = theirs(SAME[name]), ours(family, SAME[name], tmp_path / "ours")
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        assert merged[key].dtype == value.dtype, key
        # A rounding error in float32 may round to the next bfloat16.
        tolerance = 1e-6 if value.dtype == np.float32 else 2**-8
        size = tolerance * np.abs(np.float32(value)).max()
        if name == "arcee_fusion":  # mergekit's divergences have rounding errors, which decide a few elements
            assert np.sum(~np.isclose(merged[key], value, tolerance, size)) <= 2, key
            continue
        np.testing.assert_allclose(np.float32(merged[key]), np.float32(value), rtol=tolerance, atol=size, err_msg=key)


@pytest.mark.parity
@pytest.mark.parametrize("name", RANDOM)
def test_random_recipe_has_the_distribution_of_mergekit(family, theirs, tmp_path, name):
    """The share of unchanged elements and the size of the change, over all tensors."""
    expected, merged = theirs(RANDOM[name]), ours(family, RANDOM[name], tmp_path / "ours")
    base = checkpoints.load(family / "base")
    changes = [np.concatenate([np.ravel(tree[key] - base[key]) for key in base]) for tree in (merged, expected)]
    assert rms(changes[0]) == pytest.approx(rms(changes[1]), rel=0.05)
    assert np.mean(changes[0] == 0) == pytest.approx(np.mean(changes[1] == 0), abs=0.02)


RERUN = SAME | RANDOM
KINDS = (
    "slerp of the notebooks",
    "modules default",
    "della",
    "dare_ties",
    "references as mappings",
    "anchors and merge keys",
)
KINDS += ("union of vocabularies", "passthrough with an empty last slice", "misplaced keys")


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.exhaustive) for name in RERUN]
)
def test_written_recipe_runs_again(family, tmp_path, monkeypatch, name):
    """From any working folder, with equal bytes."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    first = ours(family, RERUN[name], tmp_path / "first")
    again = ours(family, tmp_path / "first" / "merge_recipe.yml", tmp_path / "elsewhere" / "again")
    assert first.keys() == again.keys()
    assert all(again[key].tobytes() == value.tobytes() for key, value in first.items())
    third = ours(family, tmp_path / "elsewhere" / "again" / "merge_recipe.yml", tmp_path / "third")
    assert all(third[key].tobytes() == value.tobytes() for key, value in first.items())
    texts = [(tmp_path / name / "merge_recipe.yml").read_text() for name in ("first", "third")]
    assert texts[0].split("\n\n")[1] == texts[1].split("\n\n")[1]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi\nthere "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parity
@pytest.mark.parametrize("name", chat_templates.TEMPLATES)
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[:3]], ids=["system", "user", "answered"])
@pytest.mark.parametrize("begin", [False, True])
def test_chat_template_is_the_format_of_that_name(name, turns, begin):
    """Up to white space between turns, where mergekit's files hold line breaks that the formats do not."""
    data = pytest.importorskip("mergekit._data", reason="needs mergekit 0.1.5")
    environment = pytest.importorskip("transformers.utils.chat_template_utils")._compile_jinja_template
    text = (pathlib.Path(data.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    values = {"messages": turns, "add_generation_prompt": begin, "bos_token": "<s>", "eos_token": "</s>"}
    rendered, expected = (environment(part).render(**values) for part in (chat_templates.TEMPLATES[name], text))
    assert "".join(rendered.split()) == "".join(expected.split())
    if name in ("chatml", "mistral"):
        assert rendered == expected
