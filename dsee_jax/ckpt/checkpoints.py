"""Checkpoints of a run, through Orbax: asynchronous, whole or absent, the newest and the best kept.

Two series below one folder: ``last`` (to resume: state, masks and a JSON record) and ``best`` (what was trained, at the best
evaluation of the stage). Both are numbered by a mark that only grows during a run, so that a resumed run finds what it
would write again.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from dsee_jax.runtime import multihost
from dsee_jax.runtime.preemption import Preempted
from dsee_jax.runtime.storage import Place
from dsee_jax.typing import Masks

KEPT = 2
"""Checkpoints kept in each series: the newest, and one before it while the newest is being written."""


class Store(NamedTuple):
    """The two series of one run."""

    last: ocp.CheckpointManager
    best: ocp.CheckpointManager


class _Series(ocp.CheckpointManager):
    """A manager that leaves the question whether the job must stop to `dsee_jax.runtime.preemption`."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


@contextlib.contextmanager
def opened(folder: Place) -> Iterator[Store]:
    """Open (or make) the series below ``folder``; on leaving, wait until all that was handed over is on disk."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Process 0 says what is there: on a shared disk the others may not see it yet.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT, enable_async_checkpointing=True, single_host_load_and_broadcast=True
    )
    folder = folder.absolute() if isinstance(folder, Path) else folder
    store = Store(*(_Series(folder / name, options=options) for name in Store._fields))
    try:
        yield store
    except BaseException as error:
        # In a job, what ends one process alone leaves the others in the middle of something: they do not come to wait here.
        if not multihost.is_distributed() or isinstance(error, Preempted):
            _close(store)
        raise
    _close(store)


def _close(store: Store) -> None:
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


def latest(store: Store, where: Callable[[Any], Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return ``(record, masks)`` of the newest checkpoint, or None when there is none.

    ``where``: a function of the abstract masks that returns where each of them goes, a tree of shardings. They may have been
    saved from other devices; without it they return to the same.
    """
    mark = store.last.latest_step()
    if mark is None:
        return None
    items: dict[str, Any] = {"record": ocp.args.JsonRestore()}
    # The names are known at once; the metadata behind them only to a store that has read or written such an item.
    if "masks" in store.last.item_metadata(mark).keys():  # noqa: SIM118
        items["masks"] = ocp.args.StandardRestore(where and _there(store.last.directory / str(mark) / "masks", where))
    restored = store.last.restore(mark, args=ocp.args.Composite(**items))
    return restored["record"], restored.get("masks") or {}


def _there(folder: Any, where: Callable[[Any], Any]) -> Any:
    """Return what a saved tree of arrays is to be restored as."""
    with ocp.StandardCheckpointer() as reader:
        found: Any = reader.metadata(folder)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), getattr(found, "item_metadata", found)
    )
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), like, where(like))


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
