"""Checkpoints of a run, through Orbax: asynchronous, whole or absent, the newest and the best kept.

Two series below one folder: ``last`` (to resume: state, masks and a JSON record) and ``best`` (what was trained, at the best
evaluation of the stage). Both are numbered by a mark that only grows during a run, so that a resumed run finds what it
would write again.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dsee_jax.aliases import Masks

KEPT = 2
"""Checkpoints kept in each series: the newest, and one before it while the newest is being written."""


class Store(NamedTuple):
    """The two series of one run."""

    last: ocp.CheckpointManager
    best: ocp.CheckpointManager


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """Open (or make) the series below ``folder``; on leaving, wait until all that was handed over is on disk."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, enable_async_checkpointing=True)
    folder = folder.absolute()
    store = Store(*(ocp.CheckpointManager(folder / name, options=options) for name in Store._fields))
    try:
        yield store
    finally:
        for series in store:
            series.close()


def save(store: Store, mark: int, state: Any, masks: Masks, record: dict[str, Any]) -> None:
    """Hand a checkpoint over to be written in the background; what of ``best`` it refers to is finished first.

    Args:
      store: an opened store.
      mark: the number of the checkpoint; one that exists is left as it is.
      state: any pytree of arrays.
      masks: bool masks, may be empty.
      record: JSON values.
    """
    store.best.wait_until_finished()
    if mark in store.last.all_steps():
        return
    items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    if masks:
        items["masks"] = ocp.args.StandardSave(masks)
    store.last.save(mark, args=ocp.args.Composite(**items), force=True)


def latest(store: Store) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return ``(record, masks)`` of the newest checkpoint, or None when there is none."""
    mark = store.last.latest_step()
    if mark is None:
        return None
    items: dict[str, Any] = {"record": ocp.args.JsonRestore()}
    # The names are known at once; the metadata behind them only to a store that has read or written such an item.
    if "masks" in store.last.item_metadata(mark).keys():  # noqa: SIM118
        items["masks"] = ocp.args.StandardRestore()
    restored = store.last.restore(mark, args=ocp.args.Composite(**items))
    return restored["record"], restored.get("masks") or {}


def restore(store: Store, like: Any) -> Any:
    """Return the state of the newest checkpoint, with the structure, dtypes and shardings of ``like``."""
    mark = store.last.latest_step()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return store.last.restore(mark, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]


def save_best(store: Store, mark: int, trained: Any) -> None:
    """Hand over what was trained, as the best so far of its stage; one that exists is left as it is.

    The checkpoint that refers to the best before this one is finished first: the best that it replaces may go then.
    """
    store.last.wait_until_finished()
    if mark not in store.best.all_steps():
        store.best.save(mark, args=ocp.args.Composite(trained=ocp.args.StandardSave(trained)), force=True)


def restore_best(store: Store, mark: int, like: Any) -> Any:
    """Return what `save_best` was given under ``mark``."""
    store.best.wait_until_finished()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return store.best.restore(mark, args=ocp.args.Composite(trained=ocp.args.StandardRestore(target)))["trained"]
