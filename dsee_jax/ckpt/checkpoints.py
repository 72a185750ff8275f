"""Checkpoints of a run through Orbax, written in the background, each complete or absent; the newest and the best are kept.

A folder has two series: ``last`` (the state, the masks and a JSON record, to resume from) and ``best`` (the trained parameters
at the best evaluation of the stage). Both series number their checkpoints by a mark that only grows during a run, so that a
resumed run recognises the checkpoints that exist already.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dsee_jax.errors import Diverged
from dsee_jax.runtime import multihost
from dsee_jax.runtime.preemption import Preempted
from dsee_jax.runtime.storage import Place
from dsee_jax.typing import Masks

KEPT = 2
"""Checkpoints kept in each series: the newest, and the one before, which is needed until the newest is complete."""


class Store(NamedTuple):
    """The two series of checkpoints of a run."""

    last: ocp.CheckpointManager
    best: ocp.CheckpointManager


class _Series(ocp.CheckpointManager):
    """A manager that leaves preemption to `dsee_jax.runtime.preemption`."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


@contextlib.contextmanager
def opened(folder: Place) -> Iterator[Store]:
    """Open or create the series in ``folder``; at the end, wait until all checkpoints are on the disk."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Process 0 lists the checkpoints: on a shared disk the other processes may see them later.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT, enable_async_checkpointing=True, single_host_load_and_broadcast=True
    )
    folder = folder.absolute() if isinstance(folder, Path) else folder
    store = Store(*(_Series(folder / name, options=options) for name in Store._fields))
    try:
        yield store
    except BaseException as error:
        # In a job, an error on one process leaves the others in the middle of a step: closing would wait for them.
        if not multihost.is_distributed() or isinstance(error, Preempted | Diverged):
            _close(store)
        raise
    _close(store)


def _close(store: Store) -> None:
    for series in store:
        series.close()


def save(store: Store, mark: int, state: Any, masks: Masks, record: dict[str, Any]) -> None:
    """Start to write a checkpoint in the background, after the checkpoints of ``best`` that it refers to are complete.

    Args:
      store: an opened store.
      mark: the number of the checkpoint; an existing checkpoint of this number is kept unchanged.
      state: any pytree of arrays.
      masks: bool masks, True = kept; may be empty.
      record: JSON values.
    """
    store.best.wait_until_finished()
    if mark in store.last.all_steps():
        return
    items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    if masks:
        items["masks"] = ocp.args.StandardSave(masks)
    store.last.save(mark, args=ocp.args.Composite(**items), force=True)


def latest(store: Store, where: Callable[[Any], Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return ``(record, masks)`` of the newest checkpoint, or None without a checkpoint.

    ``where``: a function from the abstract masks to a tree of their shardings. The masks may have been saved from other
    devices; without ``where`` they are restored to the same devices.
    """
    mark = store.last.latest_step()
    if mark is None:
        return None
    items: dict[str, Any] = {"record": ocp.args.JsonRestore()}
    # keys(): a store knows the metadata of an item only after it has read or written one.
    if "masks" in store.last.item_metadata(mark).keys():  # noqa: SIM118
        items["masks"] = ocp.args.StandardRestore(
            where and _abstract(store.last.directory / str(mark) / "masks", where)
        )
    restored = store.last.restore(mark, args=ocp.args.Composite(**items))
    return restored["record"], restored.get("masks") or {}


def _abstract(folder: Any, where: Callable[[Any], Any]) -> Any:
    """Return a saved tree of arrays as shapes and types, with the shardings of ``where``."""
    with ocp.StandardCheckpointer() as reader:
        metadata: Any = reader.metadata(folder)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), getattr(metadata, "item_metadata", metadata)
    )
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), like, where(like))


def restore(store: Store, like: Any) -> Any:
    """Return the state of the newest checkpoint, with the structure, dtypes and shardings of ``like``."""
    mark = store.last.latest_step()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return store.last.restore(mark, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]


def save_best(store: Store, mark: int, trained: Any) -> None:
    """Start to write the trained parameters as the best so far of their stage; an existing checkpoint is kept unchanged.

    The checkpoint that refers to the previous best is completed first, because the previous best may be deleted now.
    """
    store.last.wait_until_finished()
    if mark not in store.best.all_steps():
        store.best.save(mark, args=ocp.args.Composite(trained=ocp.args.StandardSave(trained)), force=True)


def restore_best(store: Store, mark: int, like: Any) -> Any:
    """Return the trained parameters that `save_best` wrote under ``mark``."""
    store.best.wait_until_finished()
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return store.best.restore(mark, args=ocp.args.Composite(trained=ocp.args.StandardRestore(target)))["trained"]
