"""Interrupted runs resume to the figures and files of an uninterrupted run, value for value."""

import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from safetensors.numpy import load_file

import runs
from dsee_jax.ckpt import folders
from dsee_jax.runtime import files, preemption
from dsee_jax.train import calibrated, loop, trainer

TRAIN = pathlib.Path(__file__).parents[2] / "train.py"

CONFIGS = {
    "dsee, cubic": {
        "prune__schedule": "cubic",
        "prune__schedule_updates": 3,
        "data__split_dev": True,
        "train__rates__b": 4,
        "delta__budget": 0.05,
    },
    "dsee, interleaved": {
        "prune__schedule": "interleaved",
        "prune__schedule_updates": 3,
        "train__distill__weight": 0.5,
    },
    "platon, micro-batches": {
        "prune__score": "PLATON",
        **{"prune__schedule": "interleaved", "prune__schedule_updates": 2},
        **{"prune__calibration": 16, "data__batch_tokens": 32},
    },
    "structured, target": {
        "layers": 2,
        **{"prune__kind": "structured", "prune__score": "TAYLOR", "prune__calibration": 16},
        **{"prune__target__flops": 0.5, "prune__target__layers": True},
        **{"train__distill__weight": 0.5, "train__distill__hidden": 1.0},
    },
    "structured": {
        "layers": 2,
        "prune__kind": "structured",
        **{"prune__heads": 1, "prune__neurons": 0.4, "prune__layers": 1, "prune__hidden": 6},
    },
    "earlybert": {"prune__kind": "earlybert", "prune__heads": 1, "prune__neurons": 0.4, "prune__search": 2.0},
    "sparsegpt": {"prune__score": "SPARSEGPT", "prune__scope": "global", "prune__calibrate": "layerwise"},
    "earlybert, tolerance": {
        **{"prune__kind": "earlybert", "prune__heads": 1, "prune__neurons": 0.4, "prune__search": 3.0},
        **{"prune__check_every": 4, "prune__tolerance": 1.0, "prune__patience": 1},
    },
    "earlybert, target": {"prune__kind": "earlybert", "prune__target__flops": 0.6, "prune__search": 2.0},
    "full": {"delta__rank": 0, "delta__nonzeros": 0, "train__full": True, "train__learning_rate": 1e-3},
}
DEATHS = {
    "dsee": [("tune", 8), ("prune", 0), ("retune", 8)],
    "earlybert": [("search", 4), ("search", 8), ("draw", 0), ("tune", 8)],
}
"""The (stage, step) of the log lines after which a run dies, by the kind of its stages."""
CUT = "structured, target"
"""A run with every kind of stage but the search; runs of the other configs die in the exhaustive tier alone."""
EVERY = {"train__eval_every": 4, "train__checkpoint_every": 3, "train__epochs": 3}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """``reference(config)``: a folder with the inputs and the uninterrupted run of a config, made once."""

    @functools.cache
    def find(config):
        folder = tmp_path_factory.mktemp("uninterrupted")
        loop.run(runs.config(folder, **EVERY | CONFIGS[config]), say=lambda text: None)
        return folder

    return find


def assert_same(resumed, expected):
    """Assert equal figures, equal logs without speeds, no repeated log line, and equal tensors in all files."""
    assert runs.figures(resumed) == runs.figures(expected)
    logs = [files.read(run / folders.LOG) for run in (resumed, expected)]
    for records in logs:
        marks = [(record["stage"], record["step"], *record) for record in records]
        assert len(set(marks)) == len(marks)
        for record in records:
            record.pop("tokens_per_second", None)
    assert logs[0] == logs[1]
    for name in ("model/model.safetensors", "adapter/adapter.safetensors", "adapter/masks.safetensors"):
        assert (resumed / name).exists() == (expected / name).exists()
        if (resumed / name).exists():
            left, right = (load_file(run / name) for run in (resumed, expected))
            assert {key: array.tobytes() for key, array in left.items()} == {k: x.tobytes() for k, x in right.items()}


class Death(Exception):
    """Simulates the end of a process."""


@pytest.mark.parametrize(
    "config",
    [pytest.param(name, marks=pytest.mark.slow if name == CUT else pytest.mark.exhaustive) for name in CONFIGS],
)
def test_run_that_dies_in_every_stage_gives_the_same_result(tmp_path, monkeypatch, reference, config):
    """The run dies between checkpoints, within an epoch, after pruning, and while the results are written."""
    folder, append = reference(config), files.append
    deaths = DEATHS["earlybert" if config.startswith("earlybert") else "dsee"]
    if config == "structured, target":  # its tuning has the code of "dsee, cubic"
        deaths = deaths[1:]

    def at(stage, step):
        def dying(path, record):
            append(path, record)
            if (record["stage"], record["step"]) == (stage, step):
                raise Death

        return "append", dying

    def unwritten(path, value):
        raise Death

    again = runs.config(folder, output_dir=str(tmp_path / "again"), **EVERY | CONFIGS[config])
    for name, function in (*(at(*death) for death in deaths), ("write", unwritten)):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, function)
            with pytest.raises(Death):
                loop.run(again, say=lambda text: None)
        assert not (tmp_path / "again" / folders.METRICS).exists()
    loop.run(again, say=lambda text: None)
    assert_same(tmp_path / "again", folder / "run")


@pytest.mark.exhaustive
def test_run_that_dies_among_the_calibration_examples_gives_the_same_result(tmp_path, monkeypatch):
    """In the stage prune, and when the second round of re-tuning draws the masks again."""
    options = EVERY | CONFIGS["platon, micro-batches"]
    loop.run(runs.config(tmp_path, **options), say=lambda text: None)
    again, examples = runs.config(tmp_path, output_dir=str(tmp_path / "again"), **options), calibrated._examples
    for earlier in (0, 1):
        draws = []

        def dying(setup, draws=draws, earlier=earlier):
            draws.append(setup)
            for number, example in enumerate(examples(setup)):
                if len(draws) > earlier and number == 5:
                    raise Death
                yield example

        with monkeypatch.context() as patch:
            patch.setattr(calibrated, "_examples", dying)
            with pytest.raises(Death):
                loop.run(again, say=lambda text: None)
    loop.run(again, say=lambda text: None)
    assert_same(tmp_path / "again", tmp_path / "run")


@pytest.mark.slow
def test_damaged_files_cost_a_run_nothing_but_steps(tmp_path, monkeypatch, caplog):
    """The newest checkpoint, the log, the config and at last the figures are damaged; the result is the same."""
    loop.run(runs.config(tmp_path, **EVERY), say=lambda text: None)
    again = runs.config(tmp_path, output_dir=str(tmp_path / "again"), **EVERY)
    out, append = tmp_path / "again", files.append

    def dying(path, record):
        append(path, record)
        if (record["stage"], record["step"]) == ("retune", 8):
            raise Death

    with monkeypatch.context() as patch:
        patch.setattr(files, "append", dying)
        with pytest.raises(Death):
            loop.run(again, say=lambda text: None)
    newest = max((out / "checkpoints/last").iterdir(), key=lambda path: int(path.name))
    largest = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with (out / folders.LOG).open("ab") as file:
        file.write(b"\x00\xff garbage\n")
    (out / folders.CONFIG).write_text("model: {path")
    loop.run(again, say=lambda text: None)
    assert_same(out, tmp_path / "run")
    (out / folders.METRICS).write_text("{")
    loop.run(again, say=lambda text: None)
    assert_same(out, tmp_path / "run")
    for damaged in (
        f"{newest} is damaged",
        f"{out / folders.LOG}:",
        f"{out / folders.CONFIG}: not YAML",
        folders.METRICS,
    ):
        assert damaged in caplog.text


def start(arguments):
    environment = os.environ | {"JAX_NUMPY_RANK_PROMOTION": "raise"}
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def kill_when(arguments, condition):
    """Start a run, send SIGKILL as soon as ``condition()`` is true, and return whether the signal ended the run."""
    process = start(arguments)
    while process.poll() is None and not condition():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("config", "stage", "number"),
    [
        ("dsee, cubic", "tune", signal.SIGINT),
        pytest.param("dsee, cubic", "retune", signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param("earlybert", "search", signal.SIGTERM, marks=pytest.mark.exhaustive),
    ],
)
def test_signal_saves_the_step_and_stops(tmp_path, monkeypatch, reference, config, stage, number):
    """The signal comes at a step without a checkpoint of its own; the run resumes after this step, to the same figures."""
    options, folder = EVERY | {"train__checkpoint_every": 100} | CONFIGS[config], reference(config)
    again = runs.config(folder, output_dir=str(tmp_path / "again"), **options)
    steps, count = [], trainer.count_tokens

    def counting(batch):
        steps.append(batch)
        if len(steps) == {"tune": 6, "retune": 21, "search": 6}[stage]:
            os.kill(os.getpid(), number)
        return count(batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "count_tokens", counting)
        with pytest.raises(preemption.Preempted, match=rf"{number.name}: saved at step 6 of 1[05] of stage {stage}"):
            loop.run(again, say=lambda text: None)
    lines = []
    loop.run(again, say=lines.append)
    assert f"of stage {stage}" in str(lines[0])
    assert runs.figures(tmp_path / "again") == runs.figures(folder / "run")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("config", "first_kill"),
    [
        pytest.param("sparsegpt", 2, marks=pytest.mark.slow),  # its draw changes the weights that stay
        *(pytest.param(name, 0, marks=pytest.mark.exhaustive) for name in CONFIGS),
    ],
)
def test_run_killed_in_every_stage_gives_the_same_result(tmp_path, reference, config, first_kill):
    """SIGKILL ends the command in each stage, or in the last alone, and while it writes the model: no cleanup code runs."""
    folder, run = reference(config), tmp_path / "again"
    command = runs.arguments(folder, output_dir=str(run), **EVERY | CONFIGS[config])

    def logged(stage, count):
        return lambda: sum(r["stage"] == stage for r in files.read(run / folders.LOG)) >= count

    first, second, third = ("search", "draw", "tune") if config.startswith("earlybert") else ("tune", "prune", "retune")
    instants = [
        *(logged(first, 6), logged(second, 1), logged(third, 5)),
        lambda: (run / ".model.partial").exists() or (run / "model").exists(),
    ]
    killed = [kill_when(command, instant) for instant in instants[first_kill:]]
    assert all(killed[:-1])  # a tiny model may be written before the last signal arrives
    process = start(command)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert_same(run, folder / "run")
