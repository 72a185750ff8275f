"""Jobs of several processes: the figures of one process, also after any of them dies; errors of processes that differ."""

import argparse
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jobs
import meshes
import runs
import tiny
from dsee_jax.ckpt import folders
from dsee_jax.errors import InputError
from dsee_jax.runtime import job, multihost
from dsee_jax.train import loop


def test_single_process_is_not_distributed():
    """Nothing is joined, and every exchange returns its argument."""
    parser = argparse.ArgumentParser()
    job.arguments(parser)
    multihost.join(parser.parse_args([]))
    assert not multihost.is_distributed()
    assert multihost.is_main()
    assert multihost.owns(3)
    multihost.barrier("here")
    assert multihost.gather([1, "b"]) == [1, "b"]
    assert multihost.allgather_objects(2.5) == [2.5]
    assert multihost.map_shards(3, lambda part: (part.start, part.stop)) == [(0, 3)]
    multihost.assert_equal("config", {"train.seed": 1})
    arrays = multihost.to_host({"a": jax.numpy.arange(3), "b": {"c": np.ones(2)}})
    assert isinstance(arrays["a"], np.ndarray)
    assert arrays["a"].tolist() == [0, 1, 2]
    assert arrays["b"]["c"].sum() == 2
    with pytest.raises(KeyError), multihost.exit_on_failure():
        raise KeyError


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--process=2", "--processes=2"], {}, "--process is 2 of --processes 2; use 0 to 1"),
        (["--coordinator=here", "--processes=2", "--process=0"], {}, "--coordinator is 'here'; expected HOST:PORT"),
        (
            ["--distributed"],
            {},
            "no job is announced here .*: give --coordinator=HOST:PORT --processes=N --process=I",
        ),
        (["--distributed"], {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID is 'one' in the environment; expected a number"),
        (["--distributed"], {"JAX_PROCESS_ID": "3", "JAX_NUM_PROCESSES": "2"}, "--process is 3 of --processes 2"),
    ],
)
def test_flags_without_a_job_are_refused(monkeypatch, flags, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    job.arguments(parser)
    monkeypatch.setattr(jax.distributed, "initialize", _no_cluster)
    with pytest.raises(InputError, match=message):
        multihost.join(parser.parse_args(flags))


def _no_cluster(*args, **options):
    # The error of JAX without a cluster; the real call would fail because the backend runs already.
    raise ValueError("coordinator_address should be defined.")


def write_inputs(folder):
    tiny.bert(folder / "base", num_hidden_layers=1, head=False, **meshes.SIZES)
    runs.table(folder / "data")


def close(run, expected_run):
    """Assert equal figures and files up to rounding: sums over processes have another order."""
    figures, expected = runs.figures(run), runs.figures(expected_run)
    for stage, other in zip(figures["stages"], expected["stages"], strict=True):
        assert stage["metrics"] == pytest.approx(other["metrics"], rel=1e-4), stage["name"]
    for key in ("weight_sparsity", "kept", "flops_per_token", "model_bytes", "trainable_parameters"):
        assert figures[key] == expected[key], key
    for name in ("model/model.safetensors", "adapter/adapter.safetensors", "adapter/masks.safetensors"):
        if (expected_run / name).exists():
            one, job = (load_file(folder / name) for folder in (expected_run, run))
            assert one.keys() == job.keys()
            for path in one:
                here, there = (tensors[path].astype(np.float32) for tensors in (job, one))
                np.testing.assert_allclose(here, there, atol=1e-4, err_msg=path)


KINDS = {
    "cubic, WANDA": (2, meshes.RUNS["cubic"] | {"delta__support": "grebsmo", "mesh__data": 2}),
    "cubic, WANDA, in four": (
        4,
        meshes.RUNS["cubic"] | {"delta__support": "grebsmo", "mesh__data": 2, "mesh__fsdp": 2},
    ),
    "random, divided in two": (
        2,
        {"prune__kind": "nm", "prune__score": "random", "mesh__data": 1, "mesh__tensor": 2, "train__full": True}
        | {"delta__rank": 0, "delta__nonzeros": 0, "train__learning_rate": 1e-3},
    ),
    "sparsegpt, layer by layer": (
        2,
        {"prune__score": "SPARSEGPT", "prune__calibrate": "layerwise", "prune__sparsity": 0.4}
        | {"mesh__data": 1, "mesh__fsdp": 2},
    ),
    "gradients": (2, {"prune__score": "TAYLOR", "mesh__data": 1, "mesh__fsdp": 2}),
    "structured": (2, meshes.RUNS["structured"] | {"mesh__data": 1, "mesh__fsdp": 2}),
    "earlybert": (
        2,
        {"prune__kind": "earlybert", "prune__heads": 1, "prune__neurons": 0.4, "prune__search": 2.0, "mesh__tensor": 2}
        | {"mesh__data": 1},
    ),
}


PRINTS = (
    "import sys; from dsee_jax.data import tokens; original = tokens._encode_part; "
    "tokens._encode_part = lambda tokenizer, examples, part, *rest: "
    "(print('encodes', part.start, part.stop, file=sys.stderr), original(tokenizer, examples, part, *rest))[1]"
)
"""Code by which a process prints the texts that it encodes."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_job_has_the_figures_of_one_process(tmp_path, kind):
    """Two and four processes share weights, rows and texts; process 0 alone writes the files."""
    write_inputs(tmp_path)
    count, options = KINDS[kind]
    alone = {key: value for key, value in options.items() if not key.startswith("mesh")}
    loop.run(runs.config(tmp_path, **alone, output_dir=str(tmp_path / "one")), say=lambda text: None)
    ended = jobs.run(count, *runs.arguments(tmp_path, **options, output_dir=str(tmp_path / "job")), last=PRINTS)
    assert [status for status, *_ in ended] == [0] * count, ended
    for rows in (40, 20):
        assert f"encodes {rows - rows // count} {rows}\n" in ended[-1][2]
    assert "figures" in ended[0][1]
    assert not any(out for _, out, _ in ended[1:])
    close(tmp_path / "job", tmp_path / "one")
    if kind != "structured":
        return
    again = jobs.run(
        2, "evaluate", tmp_path / "job", "--mesh.fsdp=1", "--mesh.tensor=1", "--mesh.data=2", program="dsee_jax"
    )
    assert [status for status, *_ in again] == [0, 0], again
    assert json.loads(again[0][1]) == pytest.approx(runs.figures(tmp_path / "job")["final"], rel=1e-5)


LONG = {"train__epochs": 2, "train__retune_epochs": 6, "train__eval_every": 5, "prune__sparsity": 0.5}
"""Ten steps of tuning, thirty of re-tuning."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the inputs of a job, and with the run of `LONG` in one process."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    loop.run(runs.config(folder, **LONG, output_dir=str(folder / "one")), say=lambda text: None)
    return folder


def logged(run):
    path = run / folders.LOG
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("count", "victims"),
    [pytest.param(2, [1], marks=pytest.mark.slow), pytest.param(4, [2, 0], marks=pytest.mark.exhaustive)],
    ids=["one", "process 0 later"],
)
def test_job_survives_killed_processes(tmp_path, inputs, count, victims):
    """When one of several processes is killed, the others end at once with one line; two processes resume on another mesh.

    Every step writes a checkpoint, so that the kill interrupts one.
    """
    options, run = LONG | {"train__checkpoint_every": 1}, tmp_path / "job"
    shape = {"mesh__data": count // 2, "mesh__fsdp": 2}
    for victim, lines in zip(victims, (2, 9), strict=False):
        started = jobs.start(count, *runs.arguments(inputs, **options, **shape, output_dir=str(run)))
        while logged(run) < lines and all(process.poll() is None for process in started):
            time.sleep(0.01)
        started[victim].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        ended = jobs.end(started)
        assert ended[victim][0] == -signal.SIGKILL, ended
        assert time.monotonic() - begin < 2 * multihost.HEARTBEAT
        for number, (status, _, said) in enumerate(ended):
            # Without process 0, JAX's runtime may end the others before our handler does.
            ours = "another process is lost or cannot be reached" in said and "start all processes again" in said
            assert number == victim or (status == 1 and ours) or (victim == 0 and "another task died" in said), ended
    assert not (run / folders.METRICS).exists()
    shape = {"mesh__data": 1, "mesh__tensor": 2}
    ended = jobs.run(2, *runs.arguments(inputs, **options, **shape, output_dir=str(run)))
    assert [status for status, *_ in ended] == [0, 0], ended
    assert "resuming at step" in ended[0][1]
    close(run, inputs / "one")


SIGTERM = (
    "import os, signal; from dsee_jax.train import {0}; before = {0}.{1}; "
    "{0}.{1} = lambda *args, **options: (os.kill(os.getpid(), signal.SIGTERM), before(*args, **options))[1]"
)
"""Code by which a process sends itself the signal at every call of a function."""


@pytest.mark.slow
@pytest.mark.parametrize("host", ["localhost", "no-such-host.invalid"])
def test_process_whose_job_does_not_start_says_so_and_ends(host):
    command = [sys.executable, "-m", "train", f"--coordinator={host}:45321", "--processes=2", "--process=1"]
    done = subprocess.run([*command, "--join-timeout=1"], cwd=jobs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"the job at {host}:45321 did not start in 1 s" in done.stderr


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("", marks=pytest.mark.slow, id="within a stage"),
        *(pytest.param(place, marks=pytest.mark.exhaustive) for place in ("pruning.draw", "loop.prepare")),
    ],
)
def test_sigterm_to_one_process_stops_all(tmp_path, inputs, where):
    """Both processes save the same step and end alike: SIGTERM between stages or while loading, and within a stage."""
    options, run = LONG | {"train__checkpoint_every": 1000}, tmp_path / "job"
    arguments = runs.arguments(inputs, **options, mesh__data=1, mesh__fsdp=2, output_dir=str(run))
    if where:  # within a stage follows in each case
        ended = jobs.run(2, *arguments, last=SIGTERM.format(*where.split(".")))
        assert [status for status, *_ in ended] == [128 + signal.SIGTERM] * 2, ended
        saved = "step 1 of 30 of stage retune" if where == "pruning.draw" else "step 1 of 10 of stage tune"
        assert all(f"SIGTERM: saved at {saved}" in said for *_, said in ended), ended
    before = logged(run)
    started = jobs.start(2, *arguments)
    while logged(run) <= before and all(process.poll() is None for process in started):
        time.sleep(0.01)
    started[1].send_signal(signal.SIGTERM)
    ended = jobs.end(started)
    assert [status for status, *_ in ended] == [128 + signal.SIGTERM] * 2, ended
    (step,) = {said.partition("saved at ")[2].splitlines()[0] for *_, said in ended}
    said = []
    loop.run(runs.config(inputs, **options, output_dir=str(run)), say=said.append)
    number, stage = step.split()[1], step.split("stage ")[1].split(";")[0]
    assert str(said[0]).endswith(f"resuming at step {number} of stage {stage}")
    close(run, inputs / "one")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        pytest.param(
            "import jax; jax.__version__ = '0.4.2'",
            "process 1 of this job differs from process 0 in its versions: jax is '0.4.2'",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "import pathlib; original = pathlib.Path.is_file; "
            "pathlib.Path.is_file = lambda self: self.name != 'dev.csv' and original(self)",
            "data.dir: no file",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "from dsee_jax.runtime import storage; original = storage.size; storage.size = lambda path: original(path) + 1",
            "process 1 of this job differs from process 0 in its data: the size of",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "from dsee_jax import errors; from dsee_jax.data import tokens; "
            "tokens._encode_part = lambda *ignored: (_ for _ in ()).throw(errors.InputError('no such text'))",
            "no such text",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "--train.seed=5",
            "process 1 of this job differs from process 0 in its config: train.seed is 5 there and 0 here",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_that_differ_are_refused(tmp_path, last, message):
    """Every process prints the error, and nothing is written."""
    write_inputs(tmp_path)
    ended = jobs.run(2, *runs.arguments(tmp_path, output_dir=str(tmp_path / "run")), last=last)
    for status, _, said in ended:
        assert status == 2, ended
        assert message in said
    assert not (tmp_path / "run").exists()
