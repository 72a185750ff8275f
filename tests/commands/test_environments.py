"""A short training, a generation and a merge in the environments that break programs: one process for each environment."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

import checkpoints
import decoders
import runs
import tiny

ROOT = pathlib.Path(__file__).parents[2]

COMMANDS = """
import json, sys
import train
from dsee_jax import __main__ as verbs
from merge import __main__ as merge

work = json.loads(sys.argv[1])
for main, arguments in ((train, work["train"]), (verbs, work["generate"]), (merge, work["merge"]), (verbs, work["evaluate"])):
    if status := main.main(arguments):
        sys.exit(status)
train.main(["--keys"])
verbs.main(["--help"])
"""

LIBRARY = """
import sys
import jax
import tiny
import dsee_jax, merge
from dsee_jax.generation import pipeline

writer = pipeline.load(sys.argv[1])
for options in ({}, {"temperature": 1.0, "top_k": 4, "top_p": 0.8}, {"beams": 2, "repetition_penalty": 1.3}):
    pipeline.complete(writer, ["the cat"], key=jax.random.key(0), new_tokens=3, **options)
for dtype in ("float32", "bfloat16"):
    model, params = dsee_jax.load_pretrained(sys.argv[2], num_labels=2, dtype=dtype)
    config = dsee_jax.DeltaConfig(rank=2, nonzeros=4)
    adapter = dsee_jax.deltas.init(params, config, key=jax.random.key(0))
    logits = lambda deltas: dsee_jax.apply(model, params, adapter.replace(deltas=deltas), tiny.batch())
    jax.jit(jax.grad(lambda deltas: logits(deltas).astype("float32").sum()))(adapter.deltas)
merge.merge(params, [params, params], method="rankmean", unit="tensor")
"""

HIDDEN = "import sys; sys.modules.update(fcntl=None, resource=None)\n"
"""The standard library of Windows has neither module."""

NOTEBOOK = {"x64": {"JAX_ENABLE_X64": "1"}, "strict types": {"JAX_NUMPY_DTYPE_PROMOTION": "strict"}}
SHELL = {
    "optimised": (["-O"], {}),
    "no docstrings, and the modules of Windows": (["-OO"], {}),
    "a notebook's types, and no UTF-8": (
        [],
        {
            "JAX_ENABLE_X64": "1",
            "JAX_NUMPY_DTYPE_PROMOTION": "strict",
            "LC_ALL": "C",
            "PYTHONIOENCODING": "ascii:backslashreplace",
        },
    ),
}


def process(code, *arguments, flags=(), **environment):
    done = subprocess.run(
        [sys.executable, *flags, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])} | environment,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "UTF-8" in name else pytest.mark.exhaustive) for name in SHELL],
)
def test_commands_work_in_this_environment(tmp_path, name):
    flags, environment = SHELL[name]
    folder = tmp_path / "naïve ☃"
    decoders.write(folder / "writer")
    checkpoints.family(folder / "merge")
    work = {
        "train": runs.arguments(folder, train__epochs=1, train__retune_epochs=1, delta__support="grebsmo"),
        "generate": ["generate", str(folder / "writer"), "--prompt", "the cät", "--new-tokens", "3", "--beams", "2"],
        "merge": [
            str(checkpoints.recipe(folder / "merge", "ties", base=True, each={"weight": 0.5})),
            str(folder / "merged"),
        ],
        "evaluate": ["evaluate", str(folder / "run")],
    }
    code = HIDDEN + COMMANDS if "Windows" in name else COMMANDS
    printed = process(code, json.dumps(work), flags=flags, **environment)
    assert (folder / "merged" / "model.safetensors").exists()
    assert "model: The pretrained model." in printed
    assert "Generate text from prompts" in printed


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NOTEBOOK)
def test_library_works_with_the_types_of_this_notebook(tmp_path, name):
    decoders.write(tmp_path / "writer")
    tiny.bert(tmp_path / "base", num_hidden_layers=1)
    process(LIBRARY, str(tmp_path / "writer"), str(tmp_path / "base"), **NOTEBOOK[name])
