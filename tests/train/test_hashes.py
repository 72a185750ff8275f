"""A run goes on only with the inputs that it began with, and a finished run only with the model that it wrote."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import runs
from dsee_jax.ckpt import checkpoints
from dsee_jax.errors import InputError
from dsee_jax.export.run import export_run
from dsee_jax.train import hashes, inputs, loop, setup
from dsee_jax.train.finished_run import evaluate, load

HERE = pathlib.Path()


def scale(path):
    save_file({name: array * np.float32(1.7) for name, array in load_file(path).items()}, path)


def edit(path, function):
    lines = path.read_text().split("\n")
    path.write_text("\n".join(function(lines)))


def set_field(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


CHANGES = {
    "base/model.safetensors": scale,
    "base/config.json": lambda path: set_field(path, hidden_act="relu"),
    "base/tokenizer_config.json": lambda path: set_field(path, do_lower_case=False),
    "data: the train examples": lambda path: edit(path / "train.csv", lambda lines: lines[:1] + lines[-2:0:-1] + [""]),
    "data: the dev examples": lambda path: edit(path / "dev.csv", lambda lines: [*lines[:11], ""]),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that stopped in its first stage, with its base and data; all paths are relative."""
    folder = tmp_path_factory.mktemp("stopped")

    def dying(*arguments):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(checkpoints, "save_best", dying)
        with pytest.raises(KeyboardInterrupt):
            loop.run(runs.config(HERE), say=lambda text: None)
    return folder


@pytest.fixture
def begun(stopped, tmp_path, monkeypatch):
    """A copy of the stopped run, which is the working folder."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.usefixtures("begun")
def test_changed_input_stops_a_resumed_run(changed):
    files = {path: path.stat().st_mtime_ns for path in pathlib.Path("run").rglob("*")}
    CHANGES[changed](HERE / changed.partition(":")[0])
    with pytest.raises(
        InputError, match=rf"^{changed}: changed since the run run began \(SHA-256 \w+ then, \w+ now\); "
    ):
        loop.run(runs.config(HERE), say=lambda text: None)
    assert files == {path: path.stat().st_mtime_ns for path in pathlib.Path("run").rglob("*")}


@pytest.mark.usefixtures("begun")
def test_changed_input_is_allowed_by_a_key(caplog):
    """The key is no part of the run's config, and the changed inputs become those of the run."""
    scale(HERE / "base/model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_start", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        for options in ({"train__allow_changed_inputs": True}, {}):
            with pytest.raises(KeyboardInterrupt):
                loop.run(runs.config(HERE, **options), say=lambda text: None)
    assert caplog.text.count("base/model.safetensors: changed since the run run began") == 1


@pytest.mark.usefixtures("begun")
def test_run_of_an_earlier_version_trained_its_pooler():
    """Its config has no train.head; the command with the key resumes it, and the default says which value it had."""
    path = pathlib.Path("run/config.yaml")
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("  head:")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_start", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(InputError, match=r"train.head is 'pooler\+classifier' in its config and 'auto' in yours"):
            loop.run(runs.config(HERE), say=lambda text: None)
        with pytest.raises(KeyboardInterrupt):
            loop.run(runs.config(HERE, train__head="pooler+classifier"), say=lambda text: None)


def test_run_with_the_names_of_modules_is_called_again(tmp_path, monkeypatch):
    """Its config keeps the targets as they were given."""
    options = {"delta__targets": ("attention.self.query",)}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_best", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runs.run(tmp_path, **options)
    assert "attention.self.query" in (tmp_path / "run/config.yaml").read_text()
    monkeypatch.setattr(loop, "_start", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        loop.run(runs.config(tmp_path, **options), say=lambda text: None)


@pytest.mark.usefixtures("begun")
def test_reformatted_data_are_the_same():
    """The hash is of the examples, not of the bytes of a file."""
    config = runs.config(HERE)
    before = hashes.of_inputs(config, HERE / "base", inputs.read_task(config))
    edit(HERE / "data/dev.csv", lambda lines: [line.replace(",no", ',"no"') for line in lines])
    assert hashes.of_inputs(config, HERE / "base", inputs.read_task(config)) == before


def test_finished_run_with_another_model_is_refused(tmp_path, finished_run):
    folder = finished_run("lora")
    shutil.copytree(folder / "run", tmp_path / "run")
    scale(tmp_path / "run" / "model" / "model.safetensors")
    match = "run/model/model.safetensors: changed since the run wrote it .* in .*config.yaml"
    with pytest.raises(InputError, match=match):
        evaluate(tmp_path / "run")
    with pytest.raises(InputError, match=match):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    load(tmp_path / "run", ["train.allow_changed_inputs=true"])


def test_start_on_another_base_is_refused(tmp_path, finished_run):
    """delta.start belongs to the model of its run and to its base, not to other weights of the same shapes."""
    folder = finished_run("lora")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    options = runs.FINISHED["lora"] | {
        "delta__start": str(tmp_path / "run" / "adapter"),
        "output_dir": str(tmp_path / "new"),
    }
    for path in ("base", "run/model"):
        setup.prepare(runs.config(tmp_path, model__path=str(tmp_path / path), **options))
    scale(tmp_path / "base" / "model.safetensors")
    with pytest.raises(
        InputError, match="run/adapter: the adapter was trained on other weights than those of .*base: "
    ):
        setup.prepare(runs.config(tmp_path, **options))
    setup.prepare(runs.config(tmp_path, train__allow_changed_inputs=True, **options))
