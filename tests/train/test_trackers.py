"""Trackers: the figures of a run, its resumption, and one line for a tracker that cannot start."""

import importlib.machinery
import json
import re
import shutil
import struct
import sys
import types

import pytest

import runs
from dsee_jax.config import TRACKERS, TrainConfig
from dsee_jax.errors import InputError
from dsee_jax.runtime import multihost
from dsee_jax.train import loop, output_dir, trackers
from dsee_jax.train.trackers import Tracker


def module(name: str, **members) -> types.ModuleType:
    """A module that counts as an installed package."""
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=name)
    vars(made).update(members)
    return made


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The calls so far of fake packages of all trackers."""
    made = []

    class Writer:
        def __init__(self, folder, **options):
            made.append(("tensorboard", folder, options))

        def add_scalar(self, name, value, step):
            made.append((name, value, step))

        def close(self):
            made.append(("closed",))

    class Run:
        def log(self, figures, step):
            made.append((figures, step))

        def finish(self, *status):
            made.append(("finished", *status))

    def init(**options):
        made.append(("init", options))
        return Run()

    monkeypatch.setitem(sys.modules, "tensorboardX", module("tensorboardX", SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "trackio", module("trackio", init=init))
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=init))
    return made


def test_table_has_the_names_of_the_config():
    assert tuple(trackers.TRACKERS) == TRACKERS


def test_every_stage_and_the_final_figures_reach_a_tracker(finished_run):
    tracked = json.loads((finished_run("dsee") / "tracked_figures.json").read_text())
    *figures, end = tracked
    results = json.loads((finished_run("dsee") / "run" / "metrics.json").read_text())
    assert end == ["finished", True]
    steps = [step for _, step in figures]
    assert steps == sorted(steps)
    by_name = {name: (value, step) for each, step in figures for name, value in each.items()}
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second"} < by_name.keys()
    for stage in [{"name": "before", "metrics": results["before"]}, *results["stages"]]:
        assert by_name[f"stage/{stage['name']}/accuracy"][0] == stage["metrics"]["accuracy"]
    assert by_name["final/accuracy"][0] == results["final"]["accuracy"]
    assert by_name["final/weight_sparsity"][0] == results["weight_sparsity"]
    # Ten steps of tuning, and as many of re-tuning; the figures after pruning have a step of their own.
    assert [by_name[f"stage/{name}/loss"][1] for name in ("before", "tune", "prune", "retune")] == [0, 10, 11, 21]


@pytest.mark.parametrize("name", TRACKERS)
def test_resumed_run_goes_on_in_the_run_of_the_tracker(tmp_path, calls, name):
    (tmp_path / "run").mkdir()
    config = runs.config(tmp_path, train__trackers=[name])
    for step in (None, 0):
        with trackers.opened(config, step) as (tracker,):
            tracker.log({"train/loss": 0.5}, 1)
    begun, logged, ended, again, *_ = calls
    assert ended in [("closed",), ("finished",), ("finished", 0)]
    assert logged in [("train/loss", 0.5, 1), ({"train/loss": 0.5}, 1)]
    if name == "tensorboard":
        assert (begun[2].get("purge_step"), again[2]["purge_step"]) == (None, 1)
        assert begun[1] == again[1] == str(tmp_path / "run" / "tensorboard")
    else:
        assert begun == again
        assert (begun[1]["resume"], begun[1]["config"]["train.seed"]) == ("allow", 0)


def test_new_run_in_the_folder_of_another_has_its_own_id(tmp_path, calls):
    (tmp_path / "run").mkdir()
    config = runs.config(tmp_path, train__trackers=["wandb"])
    for _ in range(2):
        with trackers.opened(config, None):
            pass
    assert calls[0][1]["id"] != calls[2][1]["id"]


def test_resumed_run_tells_its_trackers_the_checkpoint(finished_run, tmp_path, calls, monkeypatch):
    """A run that died before it wrote its figures goes on from its last step, of ten of tuning and ten of re-tuning."""
    shutil.copytree(finished_run("dsee") / "run", tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    steps = []

    def init(about):
        steps.append(about.step)
        raise KeyError

    monkeypatch.setitem(trackers.TRACKERS, "wandb", init)
    config = runs.config(finished_run("dsee"), train__trackers=["wandb"], output_dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match="wandb does not start"):
        loop.run(config, say=print)
    assert steps == [21]


def test_failed_run_is_told_apart_from_a_finished_one(tmp_path, calls):
    ends = []
    with pytest.raises(ZeroDivisionError), trackers.opened(runs.config(tmp_path), None, [Tracker(print, ends.append)]):
        _ = 1 / 0
    assert ends == [False]


def test_every_tracker_is_ended_where_one_fails(tmp_path, calls):
    ends = []
    failing, other = Tracker(print, lambda well: 1 / 0), Tracker(print, ends.append)
    with pytest.raises(ZeroDivisionError), trackers.opened(runs.config(tmp_path), None, [failing, other]):
        pass
    assert ends == [True]


def test_other_processes_track_nothing(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(multihost, "is_main", lambda: False)
    config = runs.config(tmp_path, train__trackers=["wandb"])
    trackers.check(config)
    with trackers.opened(config, None, [Tracker(print, print)]) as opened:
        assert opened == ()
    assert not calls


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboardX"), ("trackio", "trackio"), ("wandb", "wandb")]
)
def test_tracker_that_is_not_installed_is_named_with_its_command(tmp_path, monkeypatch, name, package):
    """A folder of the name of the package, such as the one that wandb writes, is no package."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / package).mkdir()
    with pytest.raises(InputError, match=f"train.trackers has '{name}'.*not installed: pip install {package}$"):
        trackers.check(runs.config(tmp_path, train__trackers=[name]))


def test_unknown_tracker_is_refused_by_the_config():
    with pytest.raises(InputError, match=r"train.trackers is 'wandbb'; expected some of .*did you mean 'wandb'"):
        TrainConfig(trackers=("wandbb",))


@pytest.mark.parametrize(("name", "fix"), [("wandb", "log in with `wandb login`"), ("trackio", "leave trackio out")])
def test_tracker_that_does_not_start_is_one_line(tmp_path, calls, monkeypatch, name, fix):
    """A tracker that started before it is ended."""

    def init(**options):
        raise KeyError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(sys.modules[name], "init", init)
    (tmp_path / "run").mkdir()
    config, ends = runs.config(tmp_path, train__trackers=[name]), []
    with pytest.raises(InputError) as error, trackers.opened(config, None, [Tracker(print, ends.append)]):
        pass
    assert re.fullmatch(f"train.trackers: {name} does not start .*api_key not configured.*: {fix}.*", str(error.value))
    assert ends == [False]


def test_tracker_that_does_not_start_leaves_the_folder_to_any_config(tmp_path, calls, monkeypatch):
    """The folder has only what the packages of the trackers wrote."""
    out = tmp_path / "run"

    def init(**options):
        assert options["dir"] == str(out)
        (out / "wandb").mkdir()
        raise KeyError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(InputError, match="wandb does not start"):
        loop.run(runs.config(tmp_path, train__trackers=["trackio", "wandb"]), say=print)
    assert [path.name for path in out.iterdir()] == ["wandb"]
    output_dir.check_output(runs.config(tmp_path, train__seed=1))
    (out / "weights.bin").touch()
    with pytest.raises(InputError, match=r"not empty and has no config\.yaml"):
        output_dir.check_output(runs.config(tmp_path))


def test_tensorboard_needs_a_folder_of_this_machine(tmp_path, calls):
    config = runs.config(tmp_path, train__trackers=["tensorboard"], output_dir="gs://bucket/run")
    with pytest.raises(InputError, match="output_dir is gs://bucket/run"):
        trackers.check(config)


@pytest.mark.slow  # importing it takes a second
def test_event_file_holds_the_figures(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra `tensorboard`")
    from tensorboardX.proto.event_pb2 import Event

    (tmp_path / "run").mkdir()
    config = runs.config(tmp_path, train__trackers=["tensorboard"])
    with trackers.opened(config, None) as (tracker,):
        tracker.log({"train/loss": 0.5, "dev/accuracy": 0.75}, 3)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    content, figures = file.read_bytes(), {}
    while content:
        (length,) = struct.unpack("<Q", content[:8])  # then its checksum, the event and its checksum
        event = Event.FromString(content[12 : 12 + length])
        figures |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        content = content[16 + length :]
    assert figures == {"train/loss": (3, 0.5), "dev/accuracy": (3, 0.75)}
