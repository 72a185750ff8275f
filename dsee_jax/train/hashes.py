"""The SHA-256 of the inputs and of the model of a run, in ``hashes.json`` of its folder.

::

    config   the settings that every call of the run shares
    base     the pretrained model: its weights, config.json and tokenizer
    data     the examples of each split
    start    the adapter delta.start
    model    the model of a finished run, as base

A resumed run reads the inputs that it began with, and a finished run has the model that it wrote.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dsee_jax.ckpt import adapter
from dsee_jax.ckpt.folders import CONFIG, HASHES, MODEL, MODEL_CONFIG, TOKENIZER_FILES, read_json
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import Config
from dsee_jax.data import Split, Task
from dsee_jax.errors import InputError
from dsee_jax.runtime import files, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.train import config_file

WEIGHTS = "*.safetensors"
"""The name of the weights of a model, in one file or several."""

Hashes: TypeAlias = Mapping[str, Mapping[str, str]]
"""The hex digests by kind (see the module) and name."""


def of_inputs(config: Config, folder: Path, task: Task) -> dict[str, dict[str, str]]:
    """Return the hashes of the inputs of a run; ``folder`` is its base. Reads each file once.

    The examples are hashed as the run reads them, in their order: the place and the format of the files do not count.
    """
    start = {WEIGHTS: adapter.fingerprint(resolve(config.delta.start))} if config.delta.start else {}
    return {"config": of_config(config), "base": of_model(folder), "data": of_data(task), "start": start}


def of_config(config: Config) -> dict[str, str]:
    """Return the hash of the `settings` of a run."""
    return {"settings": digest(settings(config))}


def of_data(task: Task) -> dict[str, str]:
    """Return the hashes of the examples of each split; those of a test half have the name ``SPLIT scoring``."""
    splits = {"train": task.train, **task.dev, **{f"{name} scoring": half for name, half in task.scoring.items()}}
    return {name: _examples(examples, task.labels) for name, examples in splits.items()}


def of_model(folder: Place) -> dict[str, str]:
    """Return the hashes of a model folder: of its weights together, of config.json, and of each file of the tokenizer."""
    paths = {name: folder / name for name in (MODEL_CONFIG, *TOKENIZER_FILES)}
    return {WEIGHTS: adapter.fingerprint(folder)} | {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items() if path.exists()
    }


def settings(config: Config) -> dict[str, Any]:
    """Return the settings that every call of a run shares, by their dotted keys: all but ``output_dir``, the mesh, trackers
    and the permission to change inputs."""
    flat = config_file.flat(config)
    free = ("output_dir", "train.allow_changed_inputs", "train.trackers")
    return {key: value for key, value in flat.items() if key not in free and not key.startswith("mesh.")}


def _examples(examples: Split, labels: tuple[str, ...]) -> str:
    columns = [column for name, column in examples._asdict().items() if name != "where"]
    return digest([labels, [column.tolist() if isinstance(column, np.ndarray) else column for column in columns]])


def digest(value: Any) -> str:
    """Return the SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(out: Place) -> dict[str, Any]:
    """Return the hashes of a run, {} where its folder has none; raises `InputError` if the file is damaged."""
    path = out / HASHES
    with storage.store_errors(path):
        if not path.exists():
            return {}
    try:
        return read_json(path)
    except InputError as error:
        raise InputError(f"{error}; delete it, and the run goes on without a comparison of its inputs") from None


def write(out: Place, hashes: Hashes) -> None:
    """Add ``hashes`` to those of a run."""
    files.write(out / HASHES, {**read(out), **hashes})


def check_inputs(config: Config, folder: Path, hashes: Hashes) -> str | None:
    """Return a line about the inputs that changed since the first call of a run, or None.

    Args:
      config: of this call.
      folder: the base.
      hashes: `of_inputs` of this call.

    Raises:
      InputError: an input changed, and ``train.allow_changed_inputs`` is not set.
    """
    out, changes = storage.as_path(config.output_dir), []
    begun = read(out)
    places = {"base": folder, "data": config.data.dir or config.data.source, "start": config.delta.start}
    for kind, place in places.items():
        for name, then, now in _changes(begun.get(kind, hashes[kind]), hashes[kind]):
            changes.append((f"{place}: the {name} examples" if kind == "data" else _path(place, name), then, now))
    since = f"changed since the run {out} began"
    return _report(
        config, changes, since, "restore them, name another output_dir, or set train.allow_changed_inputs: true"
    )


def check_model(config: Config, run: Path) -> str | None:
    """Return a line about the changes of ``model/`` since a finished run wrote it, or None; raises like `check_inputs`."""
    found = of_model(run / MODEL)
    begun = read(run).get("model", found)
    changes = [(_path(run / MODEL, name), then, now) for name, then, now in _changes(begun, found)]
    fix = f"restore it, or set train.allow_changed_inputs: true in {run / CONFIG}"
    return _report(config, changes, "changed since the run wrote it", fix)


def _changes(then: Mapping[str, str], now: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Return (name, hash then, hash now) of each name whose hash changed."""
    names = sorted(then.keys() | now.keys())
    return [(name, then.get(name, "none"), now.get(name, "none")) for name in names if then.get(name) != now.get(name)]


def _path(folder: Path | str, name: str) -> str:
    """Return the path of a hashed file, of the only one where there is one for all weights."""
    files = sorted(Path(folder).glob(name)) if name == WEIGHTS else []
    return str(files[0] if len(files) == 1 else Path(folder) / name)


def _report(config: Config, changes: list[tuple[str, str, str]], since: str, fix: str) -> str | None:
    if not changes:
        return None
    (what, then, now), *more = changes
    line = f"{what}: {since} (SHA-256 {then[:12]} then, {now[:12]} now)" + (f", and {len(more)} more" if more else "")
    if not config.train.allow_changed_inputs:
        raise InputError(f"{line}; {fix}")
    return f"{line}; going on, as train.allow_changed_inputs says"
