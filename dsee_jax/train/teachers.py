"""The teacher of a distillation, in the folder ``teacher`` of its run: the tuned values, and outputs for examples.

::

    tuned.safetensors            the trained values of the best evaluation of the stage tune
    outputs_00000.safetensors    the teacher's outputs for some batches, the longest examples first; and so on

The outputs are those of the training examples that the batches of the stage retune have. Each file is complete or absent, and
has a hash of its content. The trained values name their task and their run (`_origin`). A file of outputs names its `_key`,
the hash of all that they depend on, the numbers of the examples among it, so that a killed pass goes on where it stopped, and
outputs of anything else are computed again. Process 0 writes; on a job all processes read the same folder.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors

from dsee_jax import tree
from dsee_jax.ckpt import tensors
from dsee_jax.ckpt.folders import TEACHER
from dsee_jax.config import Config, model_task
from dsee_jax.data.batches import eval_batches
from dsee_jax.data.tokens import TeacherOutputs, Tokens
from dsee_jax.errors import InputError, shorten
from dsee_jax.models.architecture import Model
from dsee_jax.runtime import atomic, console, multihost, preemption, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.train import evaluation, hashes, pruning, sharding
from dsee_jax.train.distill import CLASSES, OUTPUTS, runs_teacher
from dsee_jax.train.losses import top_k_log_probs
from dsee_jax.train.problems import PROBLEMS
from dsee_jax.train.setup import Setup
from dsee_jax.typing import Array

PART = 32
"""Batches per file of outputs."""

_TUNED, _OUTPUTS = "tuned.safetensors", "outputs_{:05}.safetensors"
_FORMAT = "dsee_jax.teacher.2"


def save(out: Place, setup: Setup, trained: dict[str, Any], examples: np.ndarray) -> None:
    """Keep ``trained``, with the model of ``setup``, as the teacher of the run in ``out``, and compute its outputs.

    ``examples`` as for `load`.

    Raises:
      Preempted: SIGTERM or SIGINT came; the outputs so far are kept.
    """
    values = multihost.to_host(tree.flatten(trained))
    with multihost.raise_on_all():
        _write(out / TEACHER / _TUNED, values, _origin(out, setup))
    multihost.barrier("teacher")
    load(out, setup, examples)


def load(out: Place, setup: Setup, examples: np.ndarray) -> tuple[dict[str, Any] | None, TeacherOutputs | None]:
    """Return the teacher of a run: its trained values where the steps run it, else its outputs for training examples.

    Outputs that are not there, or are of another teacher, are computed.

    Args:
      out: the folder of the run.
      setup: as before pruning.
      examples: int (n,), increasing: the numbers of the training examples that the batches of the stage retune have.

    Raises:
      InputError: the trained values are missing, damaged, or of another task or run.
      Preempted: as of `save`.
    """
    path = out / TEACHER / _TUNED
    with multihost.raise_on_all():
        origin = _origin(out, setup)
        values = _trained(path, origin, setup)
    with multihost.raise_on_all():
        if _key_of(path) != origin:  # of other data, with permission; from now on the run has these
            _write(path, values, origin)
    # A section without arrays is in no file.
    sections: dict[str, Any] = {name: {} for name in setup.trained}
    trained = sharding.place(setup.placed, sections | tree.unflatten(values))
    if runs_teacher(setup.config):
        return trained, None
    return None, _outputs(out, setup, trained, _digest(values), examples)


def _trained(path: Place, origin: str, setup: Setup) -> dict[str, np.ndarray]:
    """Return the trained values of a teacher by their paths; raises `InputError` as `load`."""
    key = _key_of(path) if path.exists() else None
    found, expected = _fields(key), _fields(origin)
    other = [name for name, value in expected.items() if found.get(name) != value]
    if other == ["data_sha256"] and setup.config.train.allow_changed_inputs:
        other = []
    values = _read(path, key) if key and not other else None
    shapes = {name: leaf.shape for name, leaf in tree.flatten(setup.trained).items()}
    if values is not None and {name: leaf.shape for name, leaf in values.items()} == shapes:
        return values
    finding = "is damaged, or of another run" if path.exists() else "is missing"
    if key and other:
        kind = "task" if other[0] in ("problem", "labels") else "run"
        sides = (shorten(json.dumps(fields.get(other[0]))) for fields in (found, expected))
        finding = "is of another {}: found {} {}, expected {}".format(kind, other[0], *sides)
    raise InputError(
        f"{path} {finding}; it holds the teacher of the stage retune: restore it, or delete {path.parent.parent} to begin "
        "again"
    )


def _origin(out: Place, setup: Setup) -> str:
    """Return the key of the trained values of a teacher: format, task, and the hashes of the data and settings of its run."""
    task, begun = setup.data.task, hashes.read(out)
    about = {
        "format": _FORMAT,
        "problem": task.problem,
        "labels": list(task.labels),
        "data_sha256": hashes.digest(begun.get("data")),
        "settings_sha256": hashes.digest(begun.get("config")),
    }
    return json.dumps(about)


def _fields(key: str | None) -> dict[str, Any]:
    """Return the content of a key from `_origin`; {} for any other key."""
    try:
        fields = json.loads(key or "{}")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


def _outputs(out: Place, setup: Setup, trained: dict[str, Any], digest: str, examples: np.ndarray) -> TeacherOutputs:
    """Return the outputs of a teacher for ``examples``, from their files; parts that lack are computed first.

    ``digest`` is that of the values ``trained``.
    """
    config, tokens = setup.config, setup.data.train
    order = [rows for _, rows in eval_batches(tokens, config.train.batch_size, setup.data.edges, examples)]
    paths = [out / TEACHER / _OUTPUTS.format(number) for number in range(math.ceil(len(order) / PART))]
    state: tuple[str, list[int]] = ("", [])
    with multihost.raise_on_all():
        if multihost.is_main():
            key = _key(out, setup, digest, examples)
            state = key, [number for number, path in enumerate(paths) if _read(path, key) is None]
    key, missing = multihost.allgather_objects(state)[0]
    if missing:
        _compute(setup, trained, key, {number: paths[number] for number in missing}, examples)
    with multihost.raise_on_all():
        arrays = [_read(path, key) for path in paths]
        lost = [path for path, part in zip(paths, arrays, strict=True) if part is None]
        if lost:
            raise InputError(f"{lost[0]} cannot be read: all processes of a run need one output_dir")
    by_token = PROBLEMS[setup.data.task.problem].by_token
    return _indexed(tokens, by_token, order, [part for part in arrays if part])


def _key(out: Place, setup: Setup, digest: str, examples: np.ndarray) -> str:
    """Return the hash of all that the outputs of a teacher for ``examples`` depend on; ``digest`` is that of its values."""
    config, tokens = setup.config, setup.data.train
    read = {name: value for name, value in tokens._asdict().items() if isinstance(value, np.ndarray)}
    causal = model_task(config) == "causal-lm"
    about = {
        "format": _FORMAT,
        "tuned": digest,
        "base": hashes.read(out).get("base"),
        "tokens": _digest(read),
        "examples": _digest({"examples": examples}),
        "problem": [setup.data.task.problem, setup.data.task.labels],
        "dtypes": [config.model.dtype, config.model.param_dtype],
        "scale": [config.delta.scale, config.delta.scale_sparse],
        "batches": [config.train.batch_size, PART],
        "top_k": [config.train.distill.top_k, config.train.distill.temperature] if causal else None,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _compute(setup: Setup, trained: dict[str, Any], key: str, paths: dict[int, Place], examples: np.ndarray) -> None:
    """Compute the outputs of a teacher for some parts of ``examples``, and write each to its path."""
    config, data, placed = setup.config, setup.data, setup.placed
    problem = PROBLEMS[data.task.problem]
    predict = jax.jit(predictor(setup.model, config, placed, data.task.problem))
    frozen = sharding.place(placed, pruning.freeze(setup, {}))
    batches = eval_batches(data.train, config.train.batch_size, data.edges, examples)
    places = _places(data.train, problem.by_token)
    with console.bar("teacher", 0, max(paths) + 1) as advance:
        for number in range(max(paths) + 1):
            part = [*itertools.islice(batches, PART)]
            if number not in paths:
                continue
            pieces = []
            for batch, rows in part:
                computed = predict(trained, frozen, sharding.split(placed.mesh, batch))
                own = {name: (np.asarray(array), rows) for name, array in computed.items()}
                pieces.append(
                    {name: _picked(*each, data.train, places, problem.by_token) for name, each in own.items()}
                )
            _write(paths[number], {name: np.concatenate([each[name] for each in pieces]) for name in pieces[0]}, key)
            advance(number + 1, "")
            if preemption.asked():
                raise preemption.stopped(f"part {number + 1} of the outputs of the teacher")
    multihost.barrier("teacher")


def predictor(model: Model, config: Config, placed: sharding.Placement, task: str) -> Callable[..., Any]:
    """Return the function ``(trained, frozen, batch) -> outputs`` of a teacher: the arrays that a batch of the run brings.

    ``task`` is a name of `dsee_jax.train.problems.PROBLEMS`.
    """
    distill = config.train.distill

    def outputs(logits: Array, batch: Mapping[str, Array]) -> Any:
        if model_task(config) != "causal-lm":
            return {OUTPUTS: logits}
        return dict(zip((OUTPUTS, CLASSES), top_k_log_probs(logits, distill.top_k, distill.temperature), strict=True))

    return evaluation.predictor(model, config, placed, PROBLEMS[task]._replace(summary=outputs))


def _places(tokens: Tokens, by_token: bool) -> list[np.ndarray]:
    """Return the places with outputs of each example: its number or, ``by_token``, the tokens that count in the loss."""
    if not by_token:
        return [*np.arange(tokens.size)[:, None]]
    weights = np.ones(len(tokens.input_ids)) if tokens.weights is None else tokens.weights
    ranges = itertools.pairwise(tokens.offsets.tolist())
    return [start + np.flatnonzero(weights[start:end]) for start, end in ranges]


def _picked(
    array: np.ndarray, rows: np.ndarray, tokens: Tokens, places: list[np.ndarray], by_token: bool
) -> np.ndarray:
    """Return the entries of a batch's outputs that belong to the places of its examples ``rows``, one after the other."""
    if not by_token:
        return array[: len(rows)]
    return np.concatenate([array[line, places[row] - tokens.offsets[row]] for line, row in enumerate(rows)])


def _indexed(
    tokens: Tokens, by_token: bool, order: list[np.ndarray], parts: list[dict[str, np.ndarray]]
) -> TeacherOutputs:
    """Return the outputs in ``parts``, of the examples of the batches ``order``, one after the other."""
    places = _places(tokens, by_token)
    flat = np.concatenate([places[row] for row in np.concatenate(order)])
    rows = np.zeros(len(tokens.input_ids) if by_token else tokens.size, np.int64)
    rows[flat] = np.arange(len(flat))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return TeacherOutputs(rows, arrays, by_token)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of named arrays."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype} {array.shape} ".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _write(path: Place, arrays: Mapping[str, np.ndarray], key: str) -> None:
    """Write arrays as one file, completely or not at all; only process 0 does."""
    if not multihost.is_main():
        return
    with storage.written(path) as local:
        local.parent.mkdir(exist_ok=True)
        with atomic.file(local) as partial:
            tensors.save(partial, arrays, {"key": key, "sha256": _digest(arrays)})


def _key_of(path: Place) -> str | None:
    """Return the key of a file from `_write`; None where it is missing or damaged."""
    try:
        with safetensors.safe_open(storage.download(path), framework="numpy") as file:
            return (file.metadata() or {}).get("key")
    except (OSError, safetensors.SafetensorError):
        return None


def _read(path: Place, key: str) -> dict[str, np.ndarray] | None:
    """Return the arrays of a file from `_write`; None where it is missing, damaged, or has another ``key``."""
    with storage.store_errors(path):
        if not path.exists():
            return None
    try:
        with safetensors.safe_open(storage.download(path), framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    return arrays if about.get("sha256") == _digest(arrays) else None
