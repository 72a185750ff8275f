"""The exported program, run without this library and flax, computes the logits of the run's model."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from safetensors.numpy import load_file, save_file

import decoders
import dsee_jax
import tiny
from dsee_jax import __main__ as command
from dsee_jax import models, tree
from dsee_jax.export import stablehlo
from dsee_jax.models import bert
from dsee_jax.ops import dense, nn
from dsee_jax.train import finished_run

KINDS = {"dense": "lora", "masked": "dsee", "compact": "structured"}
TIERS = {"dense": pytest.mark.exhaustive, "masked": pytest.mark.exhaustive, "compact": ()}
SHAPES = ((1, 1), (3, 12), (5, 32), (3, 7))
"""Rows and lengths; 32 is the number of positions."""


@pytest.fixture(scope="module", params=[pytest.param(kind, marks=TIERS[kind]) for kind in KINDS])
def run(request, finished_run, tmp_path_factory):
    """A finished run of each kind and its exported folder, of a program with the source lines that users have."""
    folder, out = finished_run(KINDS[request.param]), tmp_path_factory.mktemp(request.param) / "out"
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 10)
    try:
        assert command.main(["export", str(folder / "run"), str(out), "--format", "stablehlo"]) == 0
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)
    return folder / "run", out


def batches():
    return [tiny.batch(rows=rows, length=length, padded=length > 10) for rows, length in SHAPES]


def logits(run, *batches):
    """The logits of each batch, from the model that `evaluate` scores, with attached updates."""
    _, _, model, params, kept = finished_run.load(run)
    return [dsee_jax.apply(model, params, kept.adapter, batch) for batch in batches]


ALONE = """
import pathlib, runpy, sys
for name in ("dsee_jax", "flax", "merge", "transformers"):
    sys.modules[name] = None  # importing one raises
import numpy as np
from safetensors.numpy import load_file, save_file
folder = pathlib.Path(sys.argv[1])
program = runpy.run_path(str(folder / "run.py"))["load"](folder)
arrays, outputs = load_file(sys.argv[2]), {}
for number in range(len(arrays) // 3):
    inputs = [arrays[f"{number}.{name}"] for name in ("input_ids", "attention_mask", "token_type_ids")]
    outputs[str(number)] = np.asarray(program(*inputs))
assert not [name for name, module in sys.modules.items() if module and name.startswith(("dsee_jax", "flax."))]
save_file(outputs, sys.argv[3])
"""


@pytest.mark.exhaustive
def test_program_runs_without_this_library(run, tmp_path):
    """In a process without dsee_jax and flax, at several batches and lengths."""
    arrays = {f"{n}.{name}": x for n, batch in enumerate(batches()) for name, x in batch.items()}
    save_file(arrays, tmp_path / "inputs")
    files = [str(run[1]), str(tmp_path / "inputs"), str(tmp_path / "outputs")]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path)
    outputs = load_file(tmp_path / "outputs")
    for number, expected in enumerate(logits(run[0], *batches())):
        np.testing.assert_allclose(outputs[str(number)], expected, atol=1e-5)


def test_signature_describes_the_program(run):
    said = json.loads((run[1] / "signature.json").read_text())
    assert [(each["name"], each["dtype"], each["shape"]) for each in said["inputs"]] == [
        (name, "int32", ["batch", "length"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert said["output"] == {"dtype": "float32", "shape": ["batch", 2], "what": "logits, one per label"}
    assert said["labels"] == ["no", "yes"]
    assert (said["longest"], said["pad_token_id"], said["jax"]) == (32, 0, jax.__version__)
    program = export.deserialize(bytearray((run[1] / "model.stablehlo").read_bytes()))
    assert set(said["platforms"]) == set(program.platforms) == {"cpu", "cuda", "tpu"}
    names = {path.name for path in run[1].iterdir()}
    assert names >= {"run.py", "weights.safetensors", "tokenizer.json"}
    # The program contains no weights and no paths of this machine.
    program = (run[1] / "model.stablehlo").read_bytes()
    assert len(program) < 100_000
    assert str(pathlib.Path(stablehlo.__file__).parent).encode() not in program
    assert str(pathlib.Path(jax.__file__).parents[1]).encode() not in program


def test_example_script_prints_the_logits(run):
    """Rows of ids on the command line; a row that is too long is a one-line error."""
    rows = [[2, 7, 9, 3], [2, 3]]
    command = [sys.executable, str(run[1] / "run.py")]
    done = subprocess.run([*command, json.dumps(rows)], capture_output=True, text=True, check=True)
    ids, mask = np.array([[2, 7, 9, 3], [2, 3, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    (expected,) = logits(run[0], {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids})
    np.testing.assert_allclose(json.loads(done.stdout), expected, atol=1e-5)
    long = subprocess.run([*command, json.dumps([[2] * 33])], capture_output=True, text=True)
    assert (long.returncode, long.stderr) == (
        *(2, "run.py: row 0 has 33 tokens; the model has 32 positions: shorten it\n"),
    )


def test_length_beyond_the_positions_is_refused(run):
    program = export.deserialize(bytearray((run[1] / "model.stablehlo").read_bytes()))
    weights = load_file(run[1] / "weights.safetensors")
    with pytest.raises(ValueError) as error:
        program.call(weights, *tiny.batch(length=33, padded=False).values())
    assert "constraint length <= 32" in str(error.value) + str(error.value.__cause__)


def test_misshapen_weights_are_refused(run):
    program = export.deserialize(bytearray((run[1] / "model.stablehlo").read_bytes()))
    weights = load_file(run[1] / "weights.safetensors")
    name = "encoder/layer_0/attention/query/kernel"
    with pytest.raises(ValueError, match="Shape mismatch .*query/kernel"):
        program.call(weights | {name: weights[name][:, 1:]}, *tiny.batch().values())


def test_bad_input_writes_nothing(run, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run[1].iterdir()}
    assert command.main(["export", str(run[0]), str(run[1]), "--format", "stablehlo"]) == 2
    assert "exists: give a new folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run[1].iterdir()} == before
    for arguments, message in (
        ([str(run[0]), str(tmp_path / "x"), "--factors"], "--factors does not apply to --format stablehlo"),
        ([str(tmp_path), str(tmp_path / "x")], "is no finished run"),
    ):
        assert command.main(["export", *arguments, "--format", "stablehlo"]) == 2
        assert message in capsys.readouterr().err
    shutil.copytree(run[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "metrics.json"))
    assert command.main(["export", str(tmp_path / "run"), str(tmp_path / "x"), "--format", "stablehlo"]) == 2
    assert "is no finished run: it lacks config.yaml or metrics.json" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_program_with_empty_layers(dtype):
    """Layers without heads or without neurons, in float32 and bfloat16."""
    widths = {"kept_heads": [0, 1], "kept_neurons": [9, 0]}
    model = bert.Bert(bert.Config.from_hf(tiny.config(**widths), dtype=dtype))
    params = tiny.params(model, jnp.zeros((1, 1), jnp.int32))
    program = export.deserialize(stablehlo.export_program(model, params).serialize())
    for batch in batches()[:2]:
        expected = jax.jit(model.apply)({"params": params}, *batch.values())
        output = program.call(tree.flatten(params), *batch.values())
        np.testing.assert_allclose(output, expected, atol=1e-5 if dtype == "float32" else 0.05)


def test_gradient_rules_lower_on_every_platform():
    """The backward rules of `dsee_jax.ops`, which an inference program does not contain."""
    x, w, b = jnp.ones((2, 3, 8)), jnp.ones((8, 8)), jnp.ones(8)
    delta = {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 8)), "values": jnp.ones(3)}
    support = jnp.zeros((3, 2), jnp.int32)

    def loss(x, delta):
        y = dense.dense(x, w, b, delta, support, scale=2.0)
        y = nn.layer_norm(nn.gelu(y) + nn.gelu_tanh(y), b, b, 1e-6)
        return jnp.sum(nn.softmax(nn.dropout(y, 0.1, key=jax.random.key(0))) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    program = export.deserialize(export.export(gradient, platforms=stablehlo.PLATFORMS)(x, delta).serialize())
    assert "optimization_barrier" in program.mlir_module()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), program.call(x, delta), gradient(x, delta))


def test_example_script_does_not_import_the_library():
    text = pathlib.Path(stablehlo.run_template.__file__).read_text()
    assert "dsee_jax" not in text
    assert "flax" not in text


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("roberta", "deberta", "mpnet", "llama", "mistral", "qwen3")
        ),
    ],
)
def test_program_of_every_family(family):
    """One program at two shapes, with padded rows; some families have no longest length."""
    fields = decoders.config(model_type=family) if family in decoders.KINDS else tiny.config(family)
    architecture = models.find(family)
    model = architecture.model(architecture.config.from_hf(fields), "sequence-classification")
    params = jax.tree.map(jnp.asarray, tiny.params(model, jnp.zeros((1, 1), jnp.int32)))
    program = stablehlo.export_program(model, params)
    for rows, length in ((1, 4), (3, 12)):
        batch = tiny.batch(rows=rows, length=length, padded=length > 4)
        batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
        output = program.call(tree.flatten(params), *(jnp.asarray(batch[name], jnp.int32) for name in models.INPUTS))
        np.testing.assert_allclose(output, model.apply({"params": params}, **batch), atol=1e-5)


BAD = {
    "": "not JSON",
    "[": "not JSON",
    "[" * 99_999: "not JSON",
    "[]": "expected rows of token ids",
    "[[]]": "expected rows of token ids",
    "[1]": "expected rows of token ids",
    '{"a": 1}': "expected rows of token ids",
    "[[1], []]": "expected rows of token ids",
    '[[1, "x"]]': 'row 0 has "x"; expected token ids from 0 to 9',
    "[[1], [10]]": "row 1 has 10; expected token ids from 0 to 9",
    "[[true]]": "row 0 has true",
    "[[1.0]]": "row 0 has 1.0",
    "[[NaN]]": "row 0 has NaN",
    "[[1, 2, 3]]": "row 0 has 3 tokens; the model has 2 positions",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_argument_of_the_example_that_is_no_rows_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(BAD[text])):
        stablehlo.run_template.rows(text, {"vocab_size": 10, "longest": 2})
