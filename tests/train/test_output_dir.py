"""The folder of a run: bad places are one line before any work, and one run writes it at a time."""

import os
import shutil

import pytest
from safetensors.numpy import load_file

import runs
from dsee_jax.ckpt import folders
from dsee_jax.config import Config
from dsee_jax.errors import InputError
from dsee_jax.runtime import lock
from dsee_jax.train import calibrated, config_file, loop
from dsee_jax.train.output_dir import check_output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dangling", "dangling is a symlink to nothing .*nowhere"),
        ("dangling/run", "dangling is a symlink to nothing"),
        ("loop", "Too many levels of symbolic links"),
        ("file/run", "file is a file; name a folder"),
        ("file", "file is a file; name a folder"),
        ("x" * 300, "File name too long"),
        ("x/" * 2000, "File name too long"),
        ("fill", "File name too long"),  # for the files of its checkpoints alone
        ("a\0b", "null byte"),
        ("~no_such_user/run", "no_such_user"),
    ],
)
def test_place_that_cannot_be_written_is_one_line(tmp_path, name, message):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.iterdir())
    name = "x/" * (2020 - len(str(tmp_path)) // 2) if name == "fill" else name
    place = name if name.startswith("~") else f"{tmp_path}/{name}"
    with pytest.raises(InputError, match=message):
        check_output(Config(output_dir=place))
    assert sorted(tmp_path.iterdir()) == before


def test_read_only_place_is_one_line(tmp_path, monkeypatch):
    """Root may write everywhere, so the system's answer is replaced."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and access(path, mode))
    with pytest.raises(InputError, match=f"output_dir {tmp_path}/a/run: {tmp_path} is read-only for you"):
        check_output(Config(output_dir=f"{tmp_path}/a/run"))


def test_disk_without_room_is_one_line(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"output_dir .*/run: needs about \d+ MiB, and its disk has 0 MiB free"):
        loop.run(runs.config(tmp_path), say=lambda text: None)
    assert not (tmp_path / "run").exists()


def test_second_run_in_a_folder_is_refused(tmp_path):
    config = runs.config(tmp_path)
    with lock.held(tmp_path / "run", "run"), pytest.raises(InputError, match="run: another run writes this folder now"):
        loop.run(config, say=lambda text: None)
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """The folder of a run whose score of pruning could not be computed, after the stage tune."""
    folder = tmp_path_factory.mktemp("failed")

    def failing(*arguments):
        raise InputError("the inputs are not finite")

    message = (
        "^stage prune: the inputs are not finite; nothing is pruned yet, .* same output_dir and other keys, .* above 8$"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "evidence", failing)
        with pytest.raises(InputError, match=message):
            runs.run(folder, prune__score="WANDA", prune__scope="tensor", prune__calibration=8)
    return folder


def copied(folder, tmp_path):
    """Copy the run in ``folder``, and return a function from overrides to the config of the copy."""
    shutil.copytree(folder / "run", tmp_path / "run")
    failed = {"prune__score": "WANDA", "prune__scope": "tensor", "prune__calibration": 8}
    return lambda **overrides: runs.config(folder, output_dir=str(tmp_path / "run"), **failed | overrides)


def test_score_that_fails_costs_no_tuning(failed, finished_run, tmp_path, caplog):
    """With other keys the run goes on, to the result of a run that had them from the start."""
    before = finished_run("dsee") / "run"
    config, defaults = copied(failed, tmp_path), Config().prune
    keys = {f"prune__{name}": getattr(defaults, name) for name in ("score", "scope", "calibration")}
    said = []
    loop.run(config(**keys), say=said.append)
    assert "resuming at step 10 of stage tune" in said[0]
    assert "nothing is pruned yet; the run goes on with prune.calibration 128 instead of 8, prune.scope" in caplog.text
    assert runs.figures(tmp_path / "run") == runs.figures(before)
    for name in (f"{folders.MODEL}/model.safetensors", f"{folders.ADAPTER}/adapter.safetensors"):
        left, right = (load_file(run / name) for run in (tmp_path / "run", before))
        assert {key: array.tobytes() for key, array in left.items()} == {k: x.tobytes() for k, x in right.items()}
    assert config_file.read(tmp_path / "run" / folders.CONFIG).prune.score == "WABS"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"prune__kind": "nm"}, None),
        ({"prune__kind": "structured", "prune__score": "TAYLOR", "prune__target__flops": 0.5}, None),
        ({"prune__schedule": "cubic"}, None),
        ({"prune__targets": [".*/query/kernel"]}, None),
        ({"prune__kind": "none"}, "prune.kind is 'unstructured' in its config and 'none' in yours"),
        ({"prune__kind": "earlybert", "prune__heads": 1}, "prune.heads"),
        (
            {"train__retune_epochs": 1, "prune__sparsity": 0.7},
            "train.retune_epochs is 2.0 in its config and 1.0 in yours;",
        ),
        ({"delta__targets": ["pruned"]}, "delta.targets"),
    ],
)
def test_only_keys_that_tuning_has_not_read_may_change(failed, tmp_path, overrides, key):
    config = copied(failed, tmp_path)(**overrides)
    if key is None:
        check_output(config)
    else:
        with pytest.raises(InputError, match=f"belongs to another config: {key}"):
            check_output(config)


def test_kernels_with_an_update_may_not_change(failed, tmp_path):
    """Updates of the pruned kernels have the shapes of prune.targets."""
    config, path = copied(failed, tmp_path), tmp_path / "run" / folders.CONFIG
    pruned = {"delta__targets": ["pruned"]}
    path.write_text(config_file.dump(config(**pruned)))
    check_output(config(prune__score="RIA", **pruned))
    with pytest.raises(InputError, match=r"another config: prune\.targets"):
        check_output(config(prune__targets=[".*/query/kernel"], **pruned))


def test_cuts_without_measured_times_are_refused(failed, tmp_path):
    """The times of a run were measured without narrower models."""
    config, keys = copied(failed, tmp_path), {"prune__kind": "structured", "prune__score": "TAYLOR"}
    (tmp_path / "run" / folders.CONFIG).write_text(config_file.dump(config(**keys, prune__target__latency=0.5)))
    (tmp_path / "run" / folders.LATENCY).write_text("{}")
    check_output(config(**keys, prune__target__latency=0.6))
    with pytest.raises(InputError, match=r"another config: prune\.target\.hidden"):
        check_output(config(**keys, prune__target__latency=0.6, prune__target__hidden=True))


@pytest.mark.parametrize("finished", [True, False])
def test_run_that_has_pruned_takes_no_other_keys(finished_run, tmp_path, finished):
    """Its metrics are of the keys that it began with, and so are its masks."""
    folder = finished_run("dsee")
    shutil.copytree(folder / "run", tmp_path / "run")
    if finished:  # a run without re-tuning ends with the checkpoint of the stage tune
        shutil.rmtree(tmp_path / "run" / folders.CHECKPOINTS)
        (tmp_path / "run" / folders.CHECKPOINTS / "last" / "10" / "record").mkdir(parents=True)
        (tmp_path / "run" / folders.CHECKPOINTS / "last" / "10" / "record" / "metadata").write_text('{"stage": "tune"}')
    else:
        (tmp_path / "run" / folders.METRICS).unlink()
    config = runs.config(folder, output_dir=str(tmp_path / "run"), prune__sparsity=0.7)
    with pytest.raises(InputError, match=r"another config: prune\.sparsity is 0\.5 in its config and 0\.7 in yours"):
        check_output(config)
