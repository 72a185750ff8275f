"""The output folder of a run: new, empty, or with the files of a run of the same config.

As long as nothing is pruned, a run may go on with other keys of ``prune``: a score that cannot be computed costs no tuning.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsee_jax.ckpt import checkpoints
from dsee_jax.ckpt.folders import CHECKPOINTS, CONFIG, HASHES, LATENCY, METRICS
from dsee_jax.config import PRUNED_TARGETS, Config
from dsee_jax.errors import InputError
from dsee_jax.runtime import lock, multihost, storage, writable
from dsee_jax.runtime.store_path import StorePath
from dsee_jax.train import config_file, hashes, trackers

log = logging.getLogger(__name__)


def check_output(config: Config) -> None:
    """Raise `InputError` if ``output_dir`` has other files, or the files of a run of another config.

    Keys that no stage has read so far may differ: see `_unread`.
    """
    folder = storage.as_path(config.output_dir)
    if isinstance(folder, StorePath) and folder.scheme != checkpoints.SCHEME:
        raise InputError(
            f"output_dir {folder}: Orbax, which writes the checkpoints of a run, supports {checkpoints.SCHEME}:// and no "
            "other store; use a folder (for instance of a mounted bucket), and copy model/ and adapter/ afterwards"
        )
    if isinstance(folder, Path):
        writable.check_folder(folder, "output_dir", f"{CHECKPOINTS}/{checkpoints.LONGEST}")
    with storage.store_errors(folder):
        if not _has_run(folder):
            return
        existing = _existing_config(config, folder)
        before, now = hashes.settings(existing), hashes.settings(config)
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if not changed:
            return
        free = _unread(existing, folder) & _unread(config, folder)
    other = [
        f"{key} is {before.get(key)!r} in its config and {now.get(key)!r} in yours"
        for key in changed
        if key not in free
    ]
    if other:
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        raise InputError(f"output_dir {folder} belongs to another config: {other[0]}{more}; name another folder")
    said = ", ".join(f"{key} {now[key]!r} instead of {before[key]!r}" for key in changed)
    log.warning("output_dir %s: nothing is pruned yet; the run goes on with %s", folder, said)


@contextlib.contextmanager
def claimed(folder: storage.Place, size: int) -> Iterator[None]:
    """Create the folder of a run, and refuse other runs in it during the body; a store has no folders and no locks.

    Args:
      folder: of the run.
      size: bytes of the files of a new run.

    Raises:
      InputError: on every process, if another run writes the folder, or its disk has no room for a new run.
    """
    with contextlib.ExitStack() as stack:
        with multihost.raise_on_all():
            if multihost.is_main() and isinstance(folder, Path):
                if not (folder / CHECKPOINTS).exists():
                    writable.check_space(folder, size, "output_dir")
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.held(folder, "run"))
        yield


def _unread(config: Config, folder: storage.Place) -> set[str]:
    """Return the keys of a run of ``config`` in ``folder`` that no stage has read so far: those of a pruning to come.

    The kind of pruning is among them where it prunes after the stage tune, whose steps do not depend on it then.
    """
    if config.prune.kind in ("none", "earlybert") or (folder / METRICS).exists():
        return set()
    record = checkpoints.newest_record(folder / CHECKPOINTS)
    if record is None or record.get("stage") != "tune":
        return set()
    keys = {key for key in hashes.settings(config) if key.startswith("prune.")}
    if PRUNED_TARGETS in config.delta.targets:  # the updates have the shapes of these kernels
        keys.remove("prune.targets")
    if (folder / LATENCY).exists():  # it has the times of these cuts alone
        keys -= {"prune.target.layers", "prune.target.hidden"}
    return keys


def _has_run(folder: storage.Place) -> bool:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; name a folder")
    # A crash before the config was complete leaves partial files only, a refused target its times, and a tracker its files.
    left = (LATENCY, *trackers.FILES)
    if not folder.exists() or all(path.suffix == ".partial" or path.name in left for path in folder.iterdir()):
        return False
    if not (folder / CONFIG).exists() and not (folder / HASHES).exists():
        raise InputError(f"output_dir {folder} is not empty and has no {CONFIG}: it is no run's; name another folder")
    return True


def _completed(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a config with the value of ``train.head`` that a run had before the key existed."""
    train = raw.get("train")
    if not isinstance(train, dict) or "head" in train or train.get("full"):
        return raw
    return {**raw, "train": {**train, "head": "pooler+classifier"}}


def _existing_config(config: Config, folder: storage.Place) -> Config:
    """Return the config in the folder; where it is damaged, ``config`` itself if its hash is the one of the run."""
    try:
        return config_file.read(folder / CONFIG, earlier=_completed)
    except InputError as error:
        if hashes.read(folder).get("config") != hashes.of_config(config):
            raise InputError(f"{error}; restore the config of the run {folder}, or name another folder") from None
        log.warning("%s; written again from yours, which equals it by its hash in %s", error, HASHES)
        return config
