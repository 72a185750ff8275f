"""A finished run, opened again from its files: evaluated, or written for other tools."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax import compaction, evaluation, sharding, stablehlo, step
from dsee_jax import config as configs
from dsee_jax import data as datasets
from dsee_jax import deltas as delta_trees
from dsee_jax.aliases import Params
from dsee_jax.ckpt import adapter, cuts, hf, peft
from dsee_jax.config import Config
from dsee_jax.errors import InputError
from dsee_jax.export import ADAPTER, MODEL
from dsee_jax.setup import CONFIG, read_data, read_task


class Finished(NamedTuple):
    """What a run left."""

    config: Config
    task: datasets.Task
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
    config = configs.read(run / CONFIG, overrides)
    task = read_task(config)
    model, params = hf.load_pretrained(
        *(run / MODEL, configs.model_task(config), task.num_labels),
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
    return delta_trees.materialize(
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


def export(run: Path, out: Path, *, form: str = "hf", factors: bool = False) -> None:
    """Write the model of a finished run for something else.

    Args:
      run: its folder.
      out: the folder to make.
      form: ``hf``, which any tool opens: heads and neurons that were cut out are zeros again; ``compact``, which this library
        opens: they stay away; ``stablehlo``, which needs no library but jax: a program (`dsee_jax.stablehlo`); ``peft``: the
        low-rank updates and the head, for the base they were tuned from (`dsee_jax.ckpt.peft`).
      factors: of hf and compact: keep the pruned weights as they are and copy the adapter to ``out/adapter``; else updates are
        folded in, which makes the touched kernels dense and gives any tool the tuned logits.

    Raises:
      InputError: as `opened`; ``out`` exists; or the form cannot hold this run.
    """
    if factors and form not in ("hf", "compact"):
        raise InputError(f"--factors: {form} has one way to hold updates: use it with --format hf or compact")
    found = opened(run)
    if form == "stablehlo":
        stablehlo.write(out, found.model, folded(found), source=run / MODEL, labels=found.task.labels)
    elif form == "peft":
        if not found.adapter or not found.config.delta.rank:
            raise InputError(f"{run} has no low-rank updates (delta.rank is 0): use --format hf")
        peft.save(out, found.model, found.adapter)
    else:
        _weights(run, found, out, form, factors)


def _weights(run: Path, found: Finished, out: Path, form: str, factors: bool) -> None:
    model, params, kept = found.model, found.params if factors else folded(found), cuts.read(run / MODEL)
    whole = model.config == model.config.with_widths()
    if form == "compact" and whole:
        raise InputError(f"{run} cut no heads or neurons out: there is nothing to keep compact, use --format hf")
    if form == "hf" and not whole:
        if factors:
            raise InputError("--factors: the updates have the shapes of the cut model: use it with --format compact")
        if not kept:
            raise InputError(f"{run / MODEL / cuts.KEPT} is missing: it says where the zeros belong")
        (model, params), kept = compaction.expand(model, params, kept), {}
    hf.save_pretrained(out, model, params, source=run / MODEL, kept=kept)
    if found.adapter and factors:
        shutil.copytree(run / ADAPTER, out / ADAPTER)
