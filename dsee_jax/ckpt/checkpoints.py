"""Checkpoints of a run through Orbax, written in the background, each complete or absent; the newest and the best are kept.

A folder has two series: ``last`` (the state, the masks and a JSON record, to resume from) and ``best`` (the trained parameters
at the best evaluation of the stage). Both series number their checkpoints by a mark that only grows during a run, so that a
resumed run recognises the checkpoints that exist already.

Each checkpoint on a disk has checksums, which become visible together with it. A damaged checkpoint is set aside when a run
resumes, and the run goes back to the newest whole one. Stores have checksums of their own.
"""

import contextlib
import errno
import functools
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from dsee_jax.ckpt import checksums
from dsee_jax.errors import InputError, Stopped
from dsee_jax.runtime import multihost
from dsee_jax.runtime.storage import Place, StoreError, remote, store_errors
from dsee_jax.typing import Masks

log = logging.getLogger(__name__)

# Otherwise etils reads stores through TensorFlow where it is installed, with TensorFlow's credentials.
os.environ.setdefault("EPATH_USE_TF", "false")

SCHEME = "gs"
"""The scheme of the stores that Orbax supports."""

KEPT = 2
"""Checkpoints kept in each series: the newest, and the one before, which is needed until the newest is complete."""

LONGEST = f"last/1000000.orbax-checkpoint-tmp/state.orbax-checkpoint-tmp/ocdbt.process_1000/d/{'0' * 32}.__lock"
"""The name of a file of a checkpoint, as long as any."""

DAMAGED = "damaged"
"""The folder, beside the series, of the damaged checkpoints."""

_PARTIAL, _METADATA = ".orbax-checkpoint-tmp", "_CHECKPOINT_METADATA"
"""The end of the name of a folder that Orbax has not completed, and the file that Orbax changes last."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Open or create the series in ``folder``; at the end, wait until all checkpoints are on the disk.

    Raises:
      InputError: every checkpoint is damaged.
      StoreError: a checkpoint could not be written; the error of a save comes at the next call that waits for the save.
    """
    # Orbax prints the tracebacks of failed saves, which are raised too.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with multihost.raise_on_all():
        if multihost.is_main() and isinstance(folder, Path):
            _set_damaged_aside(folder)
    root = folder.absolute() if isinstance(folder, Path) else epath.Path(str(folder))
    store = Store(*(_series(root / name) for name in Store._fields))
    newest = store.last.latest_step()
    for mark in store.best.all_steps():
        if newest is None or mark > newest:
            store.best.delete(mark)  # of steps that the run does again
    before = sys.unraisablehook
    if getattr(before, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, before)
    try:
        yield store
    except Stopped:  # on every process at the same step
        _finish(store)
        sys.unraisablehook = before
        raise
    except BaseException:
        # In a job, an error on one process leaves the others in the middle of a step: closing would wait for them.
        if not multihost.is_distributed():
            _close(store)
        raise  # the hook stays: threads of TensorStore may still write for the save that failed
    else:
        _finish(store)
        sys.unraisablehook = before


def _unraisable(report: Callable[[Any], object], error: Any) -> None:
    """Report an error that nobody can catch, but those of the writes that end after the save they belong to has failed."""
    text = str(error.exc_value)
    late = error.object is None and text == "Event loop is closed"  # of a thread, not of a destructor
    if not late and not text.startswith("sys.meta_path is None"):
        report(error)


def _series(folder: Path | epath.Path) -> _Series:
    def seal() -> None:
        """Write the checksums; process 0 calls this when all processes have written, before the checkpoint is renamed."""
        if isinstance(folder, Path):
            for partial in folder.glob(f"*{_PARTIAL}"):
                checksums.write(partial, without=[_METADATA])

    options = ocp.CheckpointManagerOptions(
        max_to_keep=KEPT,
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=seal),
        # Process 0 lists the checkpoints: on a shared disk the other processes may see them later.
        single_host_load_and_broadcast=True,
    )
    return _Series(folder, options=options)


def _finish(store: Store) -> None:
    try:
        for series in store:
            _wait(series)
    finally:
        _close(store)


def _close(store: Store) -> None:
    for series in store:
        # The first calls raise the error of a failed save once more, before anything is closed.
        for _ in range(4):
            with contextlib.suppress(Exception):
                series.close()
                break


def _wait(series: ocp.CheckpointManager) -> None:
    with _writing(series):
        series.wait_until_finished()


@contextlib.contextmanager
def _writing(series: ocp.CheckpointManager) -> Iterator[None]:
    """Turn the errors of a save, or of the save before, into one line; Orbax and TensorStore raise several types."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        full = next((os.strerror(number) for number in _NO_SPACE if os.strerror(number) in text), None)
        reason = f"{full}, {_free(series.directory)}" if full else text[:300]
        raise StoreError(f"{series.directory}: a checkpoint could not be written: {reason}") from None


@contextlib.contextmanager
def _reading(series: ocp.CheckpointManager, mark: int | None) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(
            f"{series.directory / str(mark)} cannot be restored ({reason}): move it away, and the same command goes back to "
            "the checkpoint before it"
        ) from None


def _free(folder: Any) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB are free on the disk"


def _set_damaged_aside(folder: Path) -> None:
    """Move checkpoints that cannot be resumed from to `DAMAGED`, and say so: the newest whole one becomes the newest.

    A checkpoint of ``last`` is whole if its best is whole too. Where no such is left, a checkpoint without its best will do.
    """
    for partial in folder.glob(f"*/*{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    places = {
        name: {int(path.name): path for path in sorted((folder / name).glob("*")) if path.name.isdigit()}
        for name in Store._fields
    }
    # The newest checkpoint is read first, and those before it only where it is damaged.
    damage: dict[Path, str] = {}
    whole: list[int] = []
    for mark, path in sorted(places["last"].items(), reverse=True):
        if found := _damage(path):
            damage[path] = found
            continue
        whole.append(mark)
        best = places["best"].get(_best(path))
        if best is None or (best not in damage and not (found := _damage(best))):
            break
        damage.setdefault(best, found or "")
    if not damage:
        return
    if places["last"] and not whole:
        lines = "; ".join(f"{path}: {found}" for path, found in sorted(damage.items()))
        raise InputError(f"no checkpoint of this run is whole ({lines}): delete {folder} to begin the run again")
    lost = {mark for mark, path in places["best"].items() if path in damage}
    complete = [mark for mark in whole if _best(places["last"][mark]) not in lost]
    newest = max(complete or whole, default=0)
    for mark, path in places["last"].items():
        if mark > newest and path not in damage:
            damage[path] = f"it needs {places['best'][_best(path)]}"
    for path, found in damage.items():
        aside = folder / DAMAGED / f"{path.parent.name}_{path.name}"
        log.warning("%s is damaged (%s): set aside as %s; the run goes on without it", path, found, aside)
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        path.replace(aside)


def newest(folder: Place) -> int | None:
    """Return the mark of the checkpoint that a run in ``folder`` goes on from, None without one.

    Damaged checkpoints are set aside as by `opened`; nothing is created.

    Raises:
      InputError: every checkpoint is damaged.
    """
    if isinstance(folder, Path):
        _set_damaged_aside(folder)
    with store_errors(folder):
        return max(ocp.utils.checkpoint_steps(epath.Path(str(folder / "last"))), default=None)


def newest_record(folder: Place) -> dict[str, Any] | None:
    """Return the record of the newest checkpoint of a run in ``folder``, whole or not; None without one that can be read.

    Nothing is changed: other processes may write the folder.
    """
    last = epath.Path(str(folder / "last"))
    with store_errors(folder):
        mark = max(ocp.utils.checkpoint_steps(last), default=None)
        if mark is None:
            return None
        try:
            record = json.loads((last / str(mark) / "record" / "metadata").read_text())
        except (FileNotFoundError, ValueError):
            return None
    return record if isinstance(record, dict) else None


def _damage(checkpoint: Path) -> str | None:
    """Return the damage of a checkpoint, None if it is whole."""
    for item in ("state", "record") if checkpoint.parent.name == "last" else ("trained",):
        if not (checkpoint / item).is_dir():
            return f"{item} is missing"
    try:
        found = checksums.damage(checkpoint)
        if not found and not isinstance(json.loads((checkpoint / _METADATA).read_bytes()), dict):
            found = f"{_METADATA} is damaged"
        return found
    except (FileNotFoundError, ValueError):
        return f"{_METADATA} is damaged"


def _best(checkpoint: Path) -> int:
    """Return the mark of the best that a whole checkpoint of ``last`` refers to; -1 where it refers to none."""
    best = json.loads((checkpoint / "record" / "metadata").read_bytes()).get("best")
    return best["mark"] if best else -1


def save(store: Store, mark: int, state: Any, masks: Masks, record: dict[str, Any]) -> None:
    """Start to write a checkpoint in the background, after the checkpoints of ``best`` that it refers to are complete.

    Args:
      store: an opened store.
      mark: the number of the checkpoint; an existing checkpoint of this number is kept unchanged.
      state: any pytree of arrays.
      masks: bool masks, True = kept; may be empty.
      record: JSON values; ``record["best"]["mark"]``, where there is one, is the number of the best that belongs to it.
    """
    _wait(store.best)
    if mark in store.last.all_steps():
        return
    items: dict[str, Any] = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    if masks:
        items["masks"] = ocp.args.StandardSave(masks)
    with _writing(store.last):
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
    with _reading(store.last, mark):
        # keys(): a store knows the metadata of an item only after it has read or written one.
        if "masks" in store.last.item_metadata(mark).keys():  # noqa: SIM118
            items["masks"] = ocp.args.StandardRestore(
                where and _abstract(store.last.directory / str(mark) / "masks", where)
            )
        restored = store.last.restore(mark, args=ocp.args.Composite(**items))
    record = restored["record"]
    if (best := record.get("best")) and best["mark"] not in store.best.all_steps():
        log.warning(
            "%s lacks the best checkpoint %s: it is chosen from the evaluations to come", store.best.directory, best
        )
        record = record | {"best": None}
    return record, restored.get("masks") or {}


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
    with _reading(store.last, mark):
        return store.last.restore(mark, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]


def save_best(store: Store, mark: int, trained: Any) -> None:
    """Start to write the trained parameters as the best so far of their stage; an existing checkpoint is kept unchanged.

    The checkpoint that refers to the previous best is completed first, because the previous best may be deleted now.
    """
    _wait(store.last)
    if mark not in store.best.all_steps():
        with _writing(store.best):
            store.best.save(mark, args=ocp.args.Composite(trained=ocp.args.StandardSave(trained)), force=True)


def size(trained: Any) -> int:
    """Return the least bytes of all checkpoints of a run that trains ``trained`` by AdamW."""
    return (
        KEPT * 4 * sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
    )  # the state has three of a size, the best one


def restore_best(store: Store, mark: int, like: Any) -> Any:
    """Return the trained parameters that `save_best` wrote under ``mark``; raises `InputError` if they are damaged."""
    _wait(store.best)
    place = store.best.directory / str(mark)
    with multihost.raise_on_all():
        if multihost.is_main() and not remote(place) and (found := _damage(Path(place))):
            raise InputError(f"{place} is damaged ({found}): the same command resumes without it")
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with _reading(store.best, mark):
        return store.best.restore(mark, args=ocp.args.Composite(trained=ocp.args.StandardRestore(target)))["trained"]
