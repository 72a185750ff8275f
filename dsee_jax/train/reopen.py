"""A finished run, opened again from its files: evaluated, or written for other tools."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax.ckpt import adapter, hf
from dsee_jax.ckpt.folders import ADAPTER, CONFIG, MODEL
from dsee_jax.config import Config, model_task
from dsee_jax.data import Task
from dsee_jax.deltas import fold
from dsee_jax.errors import InputError
from dsee_jax.train import config_file, evaluation, sharding, step
from dsee_jax.train.inputs import read_data, read_task
from dsee_jax.typing import Params


class Finished(NamedTuple):
    """What a run left."""

    config: Config
    task: Task
    model: Any  # a Linen module with a config
    params: Any  # pruned or cut, with the tuned head
    adapter: adapter.Adapter | None  # None where the run had no updates


def opened(run: Path, overrides: Sequence[str] = (), *, divided: bool = False) -> Finished:
    """Open the files of a finished run.

    ``divided``: put the weights on the mesh of the config, each device its part.

    Raises:
      InputError: ``run`` is no folder of a finished run, its data cannot be read again, or the adapter is of another model.
    """
    if not (run / CONFIG).exists() or not (run / "metrics.json").exists():
        raise InputError(
            f"{run} is no finished run: it lacks {CONFIG} or metrics.json; run train.py with its config again"
        )
    config = config_file.read(run / CONFIG, overrides)
    task = read_task(config)
    model, params = hf.load_pretrained(
        *(run / MODEL, model_task(config), task.num_labels),
        dtype=config.model.dtype,
        sharding=(lambda model: _placement(config, model).sharding) if divided else None,
    )
    kept = adapter.load(run / ADAPTER) if config.delta.rank or config.delta.nonzeros else None
    if kept:
        adapter.check(run / ADAPTER, run / MODEL, params, kept)
    return Finished(config, task, model, params, kept)


def _placement(config: Config, model: Any) -> sharding.Placement:
    return sharding.placement(sharding.mesh(config.mesh, batch_size=config.train.batch_size), model)


def folded(found: Finished) -> Params:
    """Return plain params that give the tuned logits: the updates, where there are any, are added to their kernels."""
    if not found.adapter:
        return found.params
    about = found.adapter.config
    return fold.materialize(
        found.params,
        found.adapter.deltas,
        found.adapter.supports,
        scale=about["scale"],
        scale_sparse=about["scale_sparse"],
    )


def evaluate(run: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Return the metrics of a finished run, from ``model/`` and ``adapter/`` alone."""
    config, task, model, params, kept = opened(run, overrides, divided=True)
    data = read_data(config, task, run / MODEL, model)
    placed = _placement(config, model)
    frozen = step.Frozen(params, kept.supports if kept else {}, {})
    trained = {"deltas": kept.deltas if kept else {}, "params": {}}
    write, score = (make(model, config, data, placed) for make in (evaluation.writer, evaluation.evaluator))
    return write(trained, frozen) | score(trained, frozen)
