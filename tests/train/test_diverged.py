"""Values that are not finite: a run stops with one line, keeps its last good checkpoint, and never chooses or writes them."""

import itertools
import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import runs
import train
from dsee_jax.ckpt import checkpoints, folders
from dsee_jax.errors import Diverged, InputError
from dsee_jax.train import evaluation, loop, setup, trainer


def strict(text):
    """Parse JSON as other languages do: without NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys):
    """One line with stage, step, learning rate and checkpoint; exit status 1; the same command resumes from finite values."""
    options = {"train__learning_rate": 3e38, "train__clip": 0, "train__warmup": 0.9, "train__eval_every": 1}
    words = runs.arguments(tmp_path, **options, prune__kind="none", train__epochs=1)
    (tmp_path / "empty.yaml").write_text("{}\n")
    assert train.main([str(tmp_path / "empty.yaml"), *words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train.py")]
    assert "stage tune, step 3, learning rate 1.5e+38: the training loss is nan" in line
    assert "the last good checkpoint is of step 2" in line
    out = tmp_path / "run"
    assert not {path.name for path in out.iterdir()} & {folders.MODEL, folders.ADAPTER, folders.METRICS}
    records = [strict(line) for line in (out / folders.LOG).read_text().splitlines()]
    assert any(record.get("metrics") == {"accuracy": None, "loss": None} for record in records)

    restore, restored = checkpoints.restore, []

    def checked(*args):
        state = restore(*args)
        restored.append(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)))
        return state

    monkeypatch.setattr(checkpoints, "restore", checked)
    lines = []
    with pytest.raises(Diverged, match="stage tune, step 3"):
        loop.run(runs.config(tmp_path, **options, prune__kind="none", train__epochs=1), say=lines.append)
    assert "resuming at step 2 of stage tune" in lines[0]
    assert restored == [True]


def test_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """The loss of the last step is finite, but its update is not: no checkpoint has it, nor is it evaluated."""
    config = runs.config(tmp_path, prune__kind="none", train__epochs=1)
    made = setup.prepare(config)
    state = trainer.State(np.int32(0), {"deltas": {"a": np.array([1.0, np.inf], np.float32)}}, ())
    assert not trainer._finite(state)
    assert trainer._finite(trainer.State(np.int32(0), made.trained, ()))
    monkeypatch.setattr(trainer, "_finite", lambda state: int(state.step) < 5)
    with pytest.raises(Diverged, match="step 5, .*: the trained values are not finite; the last .* is of step 0"):
        loop.run(config, say=lambda text: None)
    assert [path.name for path in (tmp_path / "run/checkpoints/last").iterdir()] == ["0"]


@pytest.mark.parametrize("scores", [[0.1, math.nan, 0.9], [math.nan, 0.1, math.inf]])
def test_evaluation_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch, scores):
    """Neither by its score nor by its loss; the metrics of the last evaluation are null then."""
    losses = iter([0.5, *(score if not math.isfinite(score) else 0.5 for score in scores[:2]), math.nan])
    accuracies = iter([0.5, *scores])
    fake = lambda *args: lambda trained, frozen: {"accuracy": next(accuracies), "loss": next(losses)}
    monkeypatch.setattr(evaluation, "evaluator", fake)
    results, out = runs.run(tmp_path, prune__kind="none", train__epochs=3)
    assert results["final"] == {"accuracy": 0.1, "loss": 0.5}
    written = strict((out / folders.METRICS).read_text())
    assert written["stages"][-1]["evaluations"] == 3
    assert written["stages"][-1]["best_step"] == 5 * (scores.index(0.1) + 1)
    assert written["final_last"]["loss"] is None


@pytest.mark.parametrize("first", [0.5, math.nan])
def test_stage_without_a_finite_evaluation_ends_the_run(tmp_path, monkeypatch, first):
    losses = itertools.chain([first], itertools.repeat(math.nan))
    fake = lambda *args: lambda trained, frozen: {"accuracy": 0.9, "loss": next(losses)}
    monkeypatch.setattr(evaluation, "evaluator", fake)
    message = "stage before: the metrics" if first != first else "stage tune, step 10, .*: no evaluation .* is finite"
    with pytest.raises(Diverged, match=message):
        runs.run(tmp_path, prune__kind="none", train__epochs=2)
    assert not (tmp_path / "run" / folders.METRICS).exists()


def test_pretrained_weights_that_are_not_finite_are_named(tmp_path):
    """Before anything is written."""
    runs.settings(tmp_path)
    arrays = load_file(tmp_path / "base/model.safetensors")
    arrays["bert.encoder.layer.0.output.dense.weight"][3, 5] = np.nan
    save_file(arrays, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="'bert.encoder.layer.0.output.dense.weight' holds NaN or infinities"):
        runs.run(tmp_path)
    assert not (tmp_path / "run").exists()
