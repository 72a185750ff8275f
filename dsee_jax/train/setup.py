"""What a run reads, checked as a whole before the run writes anything."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsee_jax import models, stacks, tree
from dsee_jax.ckpt import adapter, hf
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import CUTTING, Config, check, model_task
from dsee_jax.deltas import create
from dsee_jax.errors import InputError
from dsee_jax.prune import units, weights
from dsee_jax.runtime import multihost, storage
from dsee_jax.train import sharding
from dsee_jax.train.inputs import Data, read_data, read_task
from dsee_jax.train.output_dir import check_output
from dsee_jax.typing import Deltas, Key, Masks, Params, Supports


class Setup(NamedTuple):
    """All that a run reads, in memory."""

    config: Config
    folder: Path  # of the pretrained model
    model: Any  # a Linen module with a config
    params: Params  # pretrained, head included
    head: list[str]  # paths of the task head
    prunable: list[str]  # paths of the kernels that may be pruned
    trained: dict[str, Any]  # {"deltas", "params"} at the start
    supports: Supports
    data: Data
    placed: sharding.Placement  # where arrays lie
    kept: Masks  # the heads and neurons that the run has kept, once it has cut some out; see `dsee_jax.prune.units`


def keys(seed: int) -> dict[str, jax.Array]:
    """Return the PRNG keys of a run by what they decide."""
    root = jax.random.key(seed)
    return {
        name: jax.random.fold_in(root, number) for number, name in enumerate(("head", "deltas", "dropout", "prune"))
    }


def prepare(config: Config) -> Setup:
    """Read and check all that a run needs; write nothing.

    Raises:
      InputError: whatever of the config, the model, the data or ``output_dir`` cannot work.
    """
    model: Any
    # A host may lack a file that the others have; what lies between and comes after they do together.
    with multihost.raise_on_all():
        check(config)
        check_output(config)
        mesh = sharding.mesh(config.mesh, batch_size=config.train.batch_size)
        folder = resolve(config.model.path)
    task, key, asked = read_task(config), keys(config.train.seed), config.model
    with multihost.raise_on_all():
        model, params = hf.load_pretrained(
            *(folder, model_task(config), task.num_labels),
            **{name: getattr(asked, name) for name in ("new_head", "dtype", "param_dtype", "scan", "remat")},
            sharding=lambda model: sharding.placement(mesh, model).sharding,
            key=key["head"],
        )
        if config.train.dropout >= 0:
            model = model.clone(config=model.config.with_dropout(config.train.dropout))
        flat = tree.flatten(params)
        head, moving = trains(config, model, params)
        prunable = tree.select(config.prune.targets, flat) if config.prune.kind != "none" else []
        for path in prunable:
            weights.check_prunable(path, flat[path].shape, config.prune)
        if config.prune.kind in CUTTING:
            units.check_units(model, params, prunable, config.prune)
    data = read_data(config, task, folder, model)
    with multihost.raise_on_all():
        deltas, supports = _updates(config, folder, model, params, key["deltas"])
    trained = {"deltas": deltas, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moving)}
    if not jax.tree.leaves(trained):
        raise InputError(
            "nothing is trained: delta.rank and delta.nonzeros are 0, and causal-lm has no new head; set one, or train.full"
        )
    placed = sharding.placement(mesh, model)
    return Setup(config, folder, model, params, head, prunable, trained, supports, data, placed, {})


def _updates(config: Config, folder: Path, model: Any, params: Params, key: Key) -> tuple[Deltas, Supports]:
    """Return the updates that a run begins with, and where their sparse values live: new ones, or those of another run."""
    delta = config.delta
    if not delta.start:
        return create.init(params, delta, key=key)
    start = storage.download(delta.start)
    kept = adapter.load(start)
    if getattr(model, "scan", False):
        kept = kept._replace(deltas=stacks.stack(kept.deltas), supports=stacks.stack(kept.supports))
    adapter.check(start, folder, params, kept)
    # Of the shapes that the config asks for, wherever their values are.
    new, _ = create.init(params, dataclasses.replace(delta, support="random"), key=key)
    here, there = ({path: leaf.shape for path, leaf in tree.flatten(one).items()} for one in (new, kept.deltas))
    for path in sorted(here.keys() | there.keys()):
        if here.get(path) != there.get(path):
            raise InputError(
                f"delta.start {start}: {path!r} is {there.get(path, 'not')} there and {here.get(path, 'not')} by this config: "
                "set delta.targets, rank and nonzeros as they were"
            )
    for name in ("scale", "scale_sparse"):
        if (found := kept.config[name]) != (asked := getattr(delta, name)):
            raise InputError(
                f"delta.start {start}: {name} is {found} there and {asked} by this config: set it as it was"
            )
    return jax.tree.map(jnp.asarray, kept.deltas), jax.tree.map(jnp.asarray, kept.supports)


def trains(config: Config, model: Any, params: Params) -> tuple[list[str], Any]:
    """Return the paths of the task head, and the tree of the params that a run trains beside its updates."""
    # What a language model ends with is its own, not of the task.
    flat, causal = tree.flatten(params), model_task(config) == "causal-lm"
    head = [] if causal else tree.select(models.find(model.config.model_type).HEAD, flat)
    return head, params if config.train.full else tree.split(params, head)[0]
