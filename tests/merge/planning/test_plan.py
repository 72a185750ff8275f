"""Plans from headers alone: matched tensors, tied heads, options, and the text description."""

from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsee_jax.errors import InputError
from merge.inputs.lazy import Lazy
from merge.inputs.sources import Source
from merge.planning import describe, plan
from merge.recipes import recipe

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}


def lazy(shape, dtype="F32"):
    """A tensor with a header only; reading it fails."""
    return Lazy(
        shape, dtype, (Path("model.safetensors"),), int(np.prod(shape)) * SIZES[dtype], lambda start, stop: 1 / 0
    )


def tensors(layers=3, width=4, vocabulary=8, dtype="F32", head=True):
    """A small model: embedding, layers of two tensors, final norm, head."""
    shapes = {"model.embed.weight": (vocabulary, width)}
    for number in range(layers):
        shapes[f"model.layers.{number}.mlp.weight"] = (width, 2 * width)
        shapes[f"model.layers.{number}.norm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if head:
        shapes["lm_head.weight"] = (vocabulary, width)
    return {name: lazy(shape, dtype) for name, shape in shapes.items()}


def opened(reference, tied=False, config=None, more=None, **shape):
    """A model from its headers; ``tied`` None: its config does not have the field."""
    fields = {"model_type": "m", "num_hidden_layers": shape.get("layers", 3)}
    fields |= {} if tied is None else {"tie_word_embeddings": tied}
    return Source(reference, Path(reference), fields | (config or {}), tensors(**shape) | (more or {}), {}, {})


@pytest.fixture
def planned(tmp_path):
    """A function that plans a recipe from its text; ``others`` replace the default models a, b and t."""

    def make(text, *others, statistics=None):
        path = tmp_path / "recipe.yml"
        path.write_text(text)
        parsed = recipe.read(path)
        sources = {name: opened(name) for name in parsed.references} | {other.reference: other for other in others}
        return plan.plan(parsed, sources, statistics)

    return make


LINEAR = (
    "merge_method: linear\nmodels: [{model: a, parameters: {weight: WEIGHT}}, {model: b, parameters: {weight: 1}}]\n"
)
TIES = "merge_method: ties\nbase_model: t\nparameters: {weight: 1, density: 0.5}\nmodels: [{model: a}, {model: b}]\n"


def test_weights_follow_gradients_and_filters(planned):
    """Outside the layers a gradient has its first value."""
    text = LINEAR.replace("WEIGHT", "[{filter: norm, value: [5, 7]}, {value: [0, 0.5, 2]}]")
    weights = {job.name: job.options["weight"] for job in planned(text).jobs}
    assert weights == {
        "model.embed.weight": (0, 1),
        "model.layers.0.mlp.weight": (0, 1),
        "model.layers.0.norm.weight": (5, 1),
        "model.layers.1.mlp.weight": (0.5, 1),
        "model.layers.1.norm.weight": (6, 1),
        "model.layers.2.mlp.weight": (2, 1),
        "model.layers.2.norm.weight": (7, 1),
        "model.norm.weight": (5, 1),
        "lm_head.weight": (0, 1),
    }


def test_single_layer_takes_the_last_value_of_a_gradient(planned):
    """The behaviour is mergekit's."""
    merge_plan = planned(LINEAR.replace("WEIGHT", "[3, 4]"), opened("a", layers=1), opened("b", layers=1))
    assert [job.options["weight"][0] for job in merge_plan.jobs] == [3, 4, 4, 3, 3]


def test_job_has_its_inputs_options_and_written_type(planned):
    merge_plan = planned(TIES, *(opened(name, dtype="BF16") for name in "tab"))
    job = merge_plan.jobs[1]
    assert (job.name, job.method, job.dtype, job.columns) == ("model.layers.0.mlp.weight", "ties", "BF16", (0, 1))
    assert (job.base.dtype, [model.dtype for model in job.models]) == ("BF16", ["BF16", "BF16"])
    assert (job.options["density"], job.options["lambda"], job.options["normalize"]) == ((0.5, 0.5), 1.0, True)
    assert (merge_plan.models, merge_plan.layers, merge_plan.notes) == (("a", "b"), None, ())
    assert job.shape == (4, 8)
    assert plan.written_bytes(job) == 64


def test_written_type_is_out_dtype_else_dtype_else_the_base_type(planned):
    """Integer tensors are copied unchanged."""
    for dtypes, expected in (("", "F32"), ("dtype: bfloat16", "BF16"), ("dtype: bfloat16\nout_dtype: float16", "F16")):
        sources = [opened(name, more={"position_ids": lazy((1, 8), "I64")}) for name in "tab"]
        jobs = {job.name: job for job in planned(TIES + dtypes, *sources).jobs}
        assert jobs["lm_head.weight"].dtype == expected
        copied = jobs["position_ids"]
        assert (copied.method, copied.dtype, copied.options) == ("copy", "I64", {})


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ("F32 BF16 BF16", "F32"),
        ("BF16 F32 BF16", "F32"),
        ("F16 F16 BF16", "F32"),
        ("F16 F16 F16", "F16"),
        ("F32 F64 BF16", "F64"),
    ],
)
def test_written_type_holds_the_values_of_every_model(planned, dtypes, expected):
    """As PyTorch promotes types, and therefore mergekit."""
    sources = [opened(name, dtype=dtype) for name, dtype in zip("tab", dtypes.split(), strict=True)]
    assert {job.dtype for job in planned(TIES, *sources).jobs} == {expected}


def test_slices_give_layers_in_order_and_the_tensors_around_them(planned):
    """The tensors before the layers come from the first slice, the tensors after the layers from the last."""
    text = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {scale: [1, 2]}}]
  - sources: [{model: b, layer_range: [1, 3]}]
    parameters: {scale: [{filter: layers.2.mlp, value: 5}, {value: 3}]}
  - sources: [{model: a, layer_range: [2, 3], parameters: {scale: [8, 9]}}]
"""
    merge_plan = planned(text)
    assert [(job.name, job.columns, job.options["scale"]) for job in merge_plan.jobs] == [
        ("model.embed.weight", (0,), (1,)),
        ("model.layers.0.mlp.weight", (0,), (1,)),
        ("model.layers.0.norm.weight", (0,), (1,)),
        ("model.layers.1.mlp.weight", (0,), (2,)),
        ("model.layers.1.norm.weight", (0,), (2,)),
        ("model.layers.2.mlp.weight", (1,), (3,)),
        ("model.layers.2.norm.weight", (1,), (3,)),
        # The third layer of b becomes the fourth: a filter is searched in the model's own name, as in mergekit.
        ("model.layers.3.mlp.weight", (1,), (5,)),
        ("model.layers.3.norm.weight", (1,), (3,)),
        ("model.layers.4.mlp.weight", (0,), (9,)),
        ("model.layers.4.norm.weight", (0,), (9,)),
        ("model.norm.weight", (0,), (8,)),
        ("lm_head.weight", (0,), (8,)),
    ]
    assert merge_plan.layers == (0, 1, 1, 2, 2)


def test_each_stack_of_layers_has_its_own_depth(planned):
    """An encoder of 3 layers and a decoder of 2."""
    more = {f"decoder.layers.{number}.weight": lazy((2,)) for number in range(2)}
    merge_plan = planned(LINEAR.replace("WEIGHT", "[0, 1]"), opened("a", more=more), opened("b", more=more))
    weights = {job.name: job.options["weight"][0] for job in merge_plan.jobs}
    assert [weights[f"model.layers.{number}.norm.weight"] for number in range(3)] == [0, 0.5, 1]
    assert [weights[f"decoder.layers.{number}.weight"] for number in range(2)] == [0, 1]


@pytest.mark.parametrize("tied", [True, None])
def test_tied_head_is_stored_as_in_the_base(planned, tied):
    """A head that a model lacks is taken from its embedding; a head that the base lacks is left out."""
    without = planned(
        TIES, opened("t", tied=tied, head=False), opened("a", tied=tied), opened("b", tied=tied, head=False)
    )
    assert "lm_head.weight" not in [job.name for job in without.jobs]
    assert without.notes == ("a stores lm_head.weight, which is tied to model.embed.weight; t does not: left out",)
    sources = [opened("t"), opened("a"), opened("b", tied=tied, head=False)]
    merge_plan = planned(TIES, *sources)
    job = next(job for job in merge_plan.jobs if job.name == "lm_head.weight")
    assert job.models[1] is sources[2].tensors["model.embed.weight"]
    assert merge_plan.notes == ("b does not store lm_head.weight: the tied model.embed.weight is taken",)
    none = planned(TIES, *(opened(name, tied=tied, head=False) for name in "tab"))
    assert (len(none.jobs), none.notes) == (8, ())


def test_untied_model_unties_the_result(planned):
    """A tied model's head is its embedding; one model with a head of its own gives the result one."""
    sources = [opened("t", tied=True, head=False), opened("a", tied=True, head=False), opened("b", tied=False)]
    merge_plan = planned(TIES, *sources)
    head = next(job for job in merge_plan.jobs if job.name == "lm_head.weight")
    embeddings = [source.tensors["model.embed.weight"] for source in sources]
    assert head.base is embeddings[0]
    assert head.models == (embeddings[1], sources[2].tensors["lm_head.weight"])
    assert merge_plan.fields == {"tie_word_embeddings": False}
    assert "b has lm_head.weight of its own: the result is not tied" in merge_plan.notes


def test_buffer_is_copied_from_the_base(planned):
    """A buffer is computed from the config; a mean of two is no buffer of either."""
    more = [
        {"model.layers.0.rotary_emb.inv_freq": lazy((size,)), "x.attention.bias": lazy((1, 1, 3, 3))}
        for size in (4, 4, 5)
    ]
    sources = [opened(name, more=one) for name, one in zip("tab", more, strict=True)]
    jobs = {job.name: job for job in planned(TIES, *sources).jobs}
    for name, tensor in more[0].items():
        assert (jobs[name].method, jobs[name].inputs) == ("copy", (tensor,))


@pytest.mark.parametrize(
    "first", ["embed_in.weight", "word_embeddings_layernorm.weight", "wpe.weight", "shared.weight"]
)
@pytest.mark.parametrize("last", ["embed_out.weight", "lm_head.weight", "norm.weight", "score.weight"])
def test_slices_take_each_end_from_their_model(planned, first, last):
    """Tensors before the layers are the first slice's, tensors after them the last slice's, as in mergekit."""
    text = (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 1]}]\n"
        "- sources: [{model: b, layer_range: [1, 2]}]\n"
    )
    ends = {reference: {first: lazy((9, 4)), last: lazy((9, 4))} for reference in "ab"}
    sources = [opened(reference, head=False, more=ends[reference]) for reference in "ab"]
    jobs = {job.name: job.models[0] for job in planned(text, *sources).jobs}
    assert jobs[first] is ends["a"][first]
    assert jobs[last] is ends["b"][last]


def test_differing_numbers_of_configs_are_named(planned):
    """Fields that change no output are not; nor a field of the other version of a config."""
    changes = [{"rope_theta": 1e4, "hidden_act": "silu", "use_cache": True}, {"rope_theta": 5e5, "hidden_act": "silu"}]
    sources = [opened(name, config={"vocab_size": 8} | one) for name, one in zip("tb", changes, strict=True)]
    assert planned(TIES, *sources).warnings == (
        "t and b differ in config.json, and the result has the first's numbers: rope_theta is 10000.0 and 500000.0",
    )
    scaled = [opened("t", config={"rope_scaling": None}), opened("a", config={"sliding_window": 8}), opened("b")]
    (warning,) = planned(TIES, *scaled).warnings
    assert warning.endswith("sliding_window is None and 8")
    older = [
        opened("t", config={"rope_parameters": {"rope_theta": 1}}),
        opened("b", config={"rope_scaling": {"factor": 2}}),
    ]
    assert planned(TIES, *older).warnings == ()


def test_statistics_are_matched_to_tensors(planned, tmp_path):
    """Gram matrices for some tensors; Fisher information for every tensor."""
    models = "models: [{model: a, statistics: a.st}, {model: b, statistics: b.st}]"
    text = f"merge_method: METHOD\nparameters: {{PARAMETERS}}\n{models}"
    files = {tmp_path / f"{name}.st": {"model.layers.0.mlp.weight": lazy((8, 8))} for name in "ab"}
    for file in files:
        file.touch()
    merge_plan = planned(text.replace("METHOD", "regmean").replace("PARAMETERS", "alpha: 0.5"), statistics=files)
    assert [len(job.statistics) for job in merge_plan.jobs] == [0, 2, 0, 0, 0, 0, 0, 0, 0]
    fisher = text.replace("METHOD", "fisher").replace("PARAMETERS", "weight: 1")
    with pytest.raises(InputError, match=r"models\[0\].statistics: \S*a.st lacks 'model.embed.weight'"):
        planned(fisher, statistics=files)
    with pytest.raises(InputError, match=r"'model.layers.0.mlp.weight' is \[8, 8\] in .*; expected \[4, 8\]"):
        planned(fisher, statistics={file: tensors() | grams for file, grams in files.items()})
    assert len(planned(fisher, statistics={file: tensors() for file in files}).jobs[0].statistics) == 2


SLICE = """
merge_method: linear
parameters: {weight: 1}
slices: [{sources: [{model: a, layer_range: RANGE}, {model: b, layer_range: [0, 1]}]}]
"""
WIDTHS = [opened("a", config={"hidden_size": 4}), opened("b", config={"hidden_size": 5})]
INTEGERS = [opened(name, more={"x.weight": lazy((4, 4), "I64")}) for name in "abt"]
MORE = opened("b", more={"x.h.0.w": lazy((2,))})
RANKMEAN = "merge_method: rankmean\nbase_model: t\nparameters: {unit: '(a'}\nmodels: [{model: a}]"
DELLA = TIES.replace("ties", "della").replace("0.5", "0.9, epsilon: 0.2")
BAD = [
    (TIES, [opened("b", layers=2)], "models[1]: b lacks the tensor 'model.layers.2.mlp.weight' and 1 more of t (did"),
    (TIES, [opened("b", layers=4)], "models[1]: b has the tensor 'model.layers.3.mlp.weight' and 1 more, which t"),
    (TIES, [opened("b", head=False)], "b lacks the tensor 'lm_head.weight' of t, and both are of one class; give --heads t"),
    (TIES, [opened("t", head=False)], "t lacks the tensor 'lm_head.weight' of a, and both are of one class; give --heads a"),
    (TIES, [opened("a")._replace(tensors={})], "a has no tensors: there is nothing to merge"),
    (TIES, [opened("b", width=5)], "'model.embed.weight' is [8, 4] in t and [8, 5] in b; merge models of one base"),
    (TIES, [opened("b", vocabulary=9)], "is [8, 4] in t and [9, 4] in b; if their vocabularies differ, add tokenizer_source"),
    (TIES, [opened("b", more={"model.norm.weight": lazy((4,), "I64")})], "'model.norm.weight' is floating point in t and I64"),
    (TIES, [opened("b", config={"model_type": "other"})], "t and b are different architectures: model_type is m in one"),
    (TIES, [opened("b", config={"quantization_config": {}})], "b is quantised"),
    (TIES, [opened("t", config={"quantization": {"bits": 4}})], "t is quantised"),
    (TIES, INTEGERS, "'x.weight' is stored as I64 in t: its weights are quantised"),
    (LINEAR.replace("WEIGHT", "-1"), [], "the weights sum to 0"),
    (LINEAR.replace("WEIGHT", "{filter: mlp, value: 1}"), [], "models[0].parameters.weight gives no value for 'model.embed"),
    (SLICE.replace("RANGE", "[3, 4]"), [], "slices[0].sources[0].layer_range is [3, 4]; a has the layers 0 to 2"),
    (SLICE.replace("RANGE", "[1, 2]"), [opened("b", layers=0)], "slices: b has no numbered layers"),
    (SLICE.replace("RANGE", "[1, 2]"), [MORE], "b has model.layers., x.h.; expected one"),
    (SLICE.replace("RANGE", "[1, 2]"), WIDTHS, "hidden_size is 4 in one and 5 in the other"),
    (RANKMEAN, [], "parameters.unit: unit '(a' is neither"),
    (DELLA, [], "parameters, for 'model.embed.weight': density 0.9 and epsilon"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "others", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_mismatch_is_one_line_that_names_it(planned, text, others, message):
    """The line names the recipe, the tensor or key, and the models."""
    with pytest.raises(InputError) as caught:
        planned(text, *others)
    assert "recipe.yml: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_description_fits_a_screen(planned):
    """The description has the models, bytes, types, shards, ranges of options, and the first tensors."""
    merge_plan = planned(TIES.replace("density: 0.5", "density: [0.2, 0.4]"), opened("b", tied=True, head=False))
    text = describe.describe(merge_plan, [("model.safetensors", [job.name for job in merge_plan.jobs])])
    assert len(text.splitlines()) <= 40
    for expected in (
        "ties",
        "base     t",
        "model  1 b",
        "9 to merge, 0 to copy; 3 outside 3 layers",
        "in 1 file(s), 9 F32",
        "density          model 0: 0.2 to 0.4, model 1: 0.2 to 0.4",
        "normalize        true",
        "the tied model.embed.weight is taken",
        "model.layers.0.mlp.weight  [4, 8]  weight=1/1 density=0.2/0.2",
    ):
        assert expected in text


def test_description_counts_long_lists(planned):
    """For many slices and shards."""
    slices = "\n".join("  - sources: [{model: a, layer_range: [0, 3]}]" for _ in range(40))
    merge_plan = planned(f"merge_method: passthrough\nslices:\n{slices}")
    text = describe.describe(
        merge_plan, [(f"{number}.safetensors", [job.name]) for number, job in enumerate(merge_plan.jobs)]
    )
    assert len(text.splitlines()) <= 40
    assert "... and 34 more slices" in text


NAMES = st.sampled_from(
    ["embed.weight", "lm_head.weight", "h.0.w", "h.1.w", "h.01.w", "h.1", "norm", "x.h.2.y", "", "é{}"]
)
NAMES |= st.text(max_size=8)
HEADERS = st.dictionaries(
    NAMES, st.tuples(st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from([*SIZES])), max_size=6
)


@hypothesis.settings(
    max_examples=200, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(headers=st.tuples(HEADERS, HEADERS, HEADERS), same=st.booleans(), text=st.sampled_from([TIES, SLICE]))
def test_any_headers_give_a_plan_or_an_input_error(planned, headers, same, text):
    """The error is one line."""
    sources = [
        Source(
            name, Path(name), {}, {key: lazy(*kind) for key, kind in (headers[0] if same else header).items()}, {}, {}
        )
        for name, header in zip("tab", headers, strict=True)
    ]
    try:
        describe.describe(planned(text.replace("RANGE", "[0, 1]"), *sources))
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
