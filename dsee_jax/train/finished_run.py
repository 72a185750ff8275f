"""A finished run, loaded from its files for evaluation, export and analysis."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax.ckpt import adapted, adapter, hf, kept_units
from dsee_jax.ckpt.folders import ADAPTER, CONFIG, METRICS, MODEL
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import Config, model_task
from dsee_jax.data import Task
from dsee_jax.deltas.fold import materialize
from dsee_jax.errors import InputError
from dsee_jax.metrics.text import NAMES
from dsee_jax.models.architecture import Model
from dsee_jax.train import config_file, evaluation, hashes, labels, sharding, step
from dsee_jax.train.inputs import read_data, read_task
from dsee_jax.typing import Params

log = logging.getLogger(__name__)


class Finished(NamedTuple):
    """The config, task, model and adapter of a finished run."""

    config: Config
    task: Task
    model: Model
    params: Any  # pruned, with the tuned head; updates are not folded in
    adapter: adapter.Saved | None  # None for a run without updates


def load(run: Path, overrides: Sequence[str] = (), *, sharded: bool = False, other: str = "") -> Finished:
    """Return a finished run from its files.

    Args:
      run: the output_dir of the run.
      overrides: ``section.key=value`` for its config.
      sharded: put the weights on the mesh of the config.
      other: the folder of an adapter of this library or of PEFT, or a hub id, to use in place of the run's own.

    Raises:
      InputError: ``run`` is no folder of a finished run, its data are unreadable, the adapter belongs to another model, or
        ``model/`` changed since the run wrote it and ``train.allow_changed_inputs`` is not set.
    """
    if not (run / CONFIG).exists() or not (run / METRICS).exists():
        raise InputError(
            f"{run} is no finished run: it lacks {CONFIG} or {METRICS}; run train.py with its config again"
        )
    config = config_file.read(run / CONFIG, overrides)
    task = read_task(config)
    model, params = hf.load_pretrained(
        *(run / MODEL, model_task(config), task.num_labels),
        dtype=config.model.dtype,
        allow_unknown=config.model.allow_unknown,
        sharding=(lambda model: _placement(config, model, run).sharding) if sharded else None,
    )
    params, names = labels.align(run / MODEL, model, params, task.labels)
    saved = None
    if other:
        params, saved = adapted.attached(resolve(other), model, params, str(run / MODEL))
    elif config.delta.rank or config.delta.nonzeros:
        saved = adapter.load(run / ADAPTER)
        adapter.check(run / ADAPTER, run / MODEL, params, saved)
    if saved and (other or config.delta.start or config.delta.budget):
        config = dataclasses.replace(config, delta=adapted.described(config.delta, saved))
    if changed := hashes.check_model(config, run):
        log.warning("%s", changed)
    return Finished(config, dataclasses.replace(task, labels=names), model, params, saved)


def _placement(config: Config, model: Model, run: Path) -> sharding.Placement:
    mesh = sharding.mesh(config.mesh, batch_size=config.train.batch_size)
    return sharding.placement(mesh, model, cut=bool(kept_units.read(run / MODEL)))


def plain_params(finished: Finished) -> Params:
    """Return plain params that give the tuned logits: the updates, where the run has any, are folded into their kernels."""
    if not finished.adapter:
        return finished.params
    return materialize(finished.params, finished.adapter.adapter)


def evaluate(run: Path, overrides: Sequence[str] = (), *, other: str = "") -> dict[str, float]:
    """Return the metrics of a finished run, computed again from ``model/`` and ``adapter/``; arguments as for `load`."""
    config, task, model, params, saved = load(run, overrides, sharded=True, other=other)
    data = read_data(config, task, run / MODEL, model)
    placed = _placement(config, model, run)
    frozen = step.Frozen(params, saved.supports if saved else {}, {})
    trained = {"deltas": saved.deltas if saved else {}, "params": {}}
    metrics = evaluation.evaluator(model, config, data, placed)(trained, frozen, final=True)
    write = evaluation.writer(model, config, data, placed)
    # A model that gives not-a-number writes a text too: the first token of its vocabulary again and again.
    texts = (
        write(trained, frozen).metrics
        if evaluation.finite(metrics) or not data.references
        else dict.fromkeys(NAMES, math.nan)
    )
    return texts | metrics
