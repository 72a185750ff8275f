"""The costs of a run before it starts: its training and evaluation steps, compiled ahead of time without weights and data.

The devices are the local ones, or a TPU topology you do not have (``v5e:16x16``; the extra `tpu` installs libtpu, whose
compiler runs on any machine). Memory is the compiler's estimate for a step of the stage tune or, where the run distils, for a
step of the stage retune with its teacher and a student that has all units. A run holds more than the arrays of a step: in the
re-tuning after unstructured or N:M pruning, except with SPARSEGPT, the frozen kernels as they were before (a teacher that the
steps run shares them), and with ``train.full`` a second state while a checkpoint is saved. The calibration of a pruning is not
counted. Time is a lower bound by a roofline: the maximum of the times for FLOPs, for memory traffic and for traffic between
chips, each at the peak rate of `roofline.CHIPS`.
"""

import dataclasses
import math
from collections.abc import Callable, Container, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsee_jax import models, tree
from dsee_jax.ckpt import hf, kept_units
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import CUTTING, Config, PruneConfig, model_task
from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Model
from dsee_jax.plan import roofline
from dsee_jax.train import distill, evaluation, inputs, optim, programs, setup, sharding, step, teachers
from dsee_jax.train.problems import PROBLEMS

DONATED = {"train": (0,), "evaluate": ()}
"""The indices of the arguments whose memory the results of each step reuse."""

Step: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and its abstract arguments: shapes with shardings."""


def abstract_steps(
    config: Config, devices: list[Any], *, labels: int = 2
) -> tuple[dict[str, Step], sharding.Placement]:
    """Return the steps ``train`` and ``evaluate`` of a config over ``devices``, and the placement of params.

    ``model.path`` may be a folder with only a ``config.json``, as of a pretrained model. Every row has
    ``data.max_length`` tokens; ``labels`` is the number of classes, 1 for regression.
    """
    where = sharding.mesh(config.mesh, batch_size=config.train.batch_size, devices=devices)
    task, options = model_task(config), config.model
    names = ("dtype", "scan", "remat", "allow_unknown")
    model = hf.abstract_model(options.path, task, labels, **{name: getattr(options, name) for name in names})
    if config.train.dropout >= 0:
        model = model.clone(config=model.config.with_dropout(config.train.dropout))
    inputs.check_length(config, options.path, model)
    folder = resolve(options.path, weights=False)
    config, start = setup.with_start(setup.with_rules(config, model), folder, model)
    placed = sharding.placement(where, model, cut=bool(kept_units.read(folder)))
    kind = jnp.dtype(options.param_dtype)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), models.shapes(model))
    moving, head = setup.trainable_params(config, folder, model, params, start), setup.task_head(config, model, params)
    config = setup.with_rank(config, params, moving, head)
    deltas, supports = jax.eval_shape(
        lambda params: setup.initial_updates(config, start, params, jax.random.key(0)), params
    )
    rest = tree.split(params, list(tree.flatten(moving)))[1]
    wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), moving)
    optimizer = optim.adamw(config.train, head)
    state = jax.eval_shape(
        lambda trained: step.State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained)),
        {"deltas": deltas, "params": wide},
    )
    problem, batch = PROBLEMS[_problem(config, labels)], _batch(config, labels)
    replicated = NamedSharding(where, PartitionSpec())
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    args = (
        _with_shardings(state, sharding.shardings(placed, state)),
        _with_shardings(frozen := step.Frozen(rest, supports, {}), sharding.shardings(placed, frozen)),
        _with_shardings(batch, dict.fromkeys(batch, NamedSharding(where, PartitionSpec(sharding.ROWS)))),
        _with_shardings(key, replicated),
        _with_shardings(jax.ShapeDtypeStruct((), jnp.float32), replicated),
    )
    if config.train.distill.weight:
        train = _distilling(model, optimizer, config, placed, _problem(config, labels), args)
    else:
        train = programs.sharded_step(model, optimizer, config, placed, losses=problem.losses), args
    predict = evaluation.predictor(model, config, placed, problem)
    return {"train": train, "evaluate": (predict, (args[0].trained, *args[1:3]))}, placed


def _distilling(
    model: Model, optimizer: Any, config: Config, placed: sharding.Placement, task: str, args: tuple[Any, ...]
) -> Step:
    """Return the step of re-tuning with the teacher of a config; ``args`` are the arguments of a step without one."""
    joined = placed.mesh.shape["tensor"] == 1
    objective = distill.objective(config, model, task, {}, joined=joined)
    one = programs.sharded_step(model, optimizer, config, placed, objective=objective)
    state, frozen, batch, key, rate = args
    trained = tree.flatten(state.trained["params"])
    cutting = config.prune.kind in CUTTING
    changed = _changed(config.prune, model, [*tree.flatten(frozen.params), *trained])
    masks = {path: leaf.update(dtype=bool) for path, leaf in trained.items() if path in changed and not cutting}
    frozen = frozen._replace(masks=tree.unflatten(masks))
    if not distill.runs_teacher(config):
        outputs = jax.eval_shape(teachers.predictor(model, config, placed, task), state.trained, frozen, batch)
        rows = NamedSharding(placed.mesh, PartitionSpec(sharding.ROWS))
        batch = batch | _with_shardings(outputs, dict.fromkeys(outputs, rows))
        return one, (state, frozen, batch, key, rate, step.Teacher(rate))
    # All other arrays are shared with the student. Masks change no supports.
    own = step.Frozen(_at(frozen.params, changed), _at(frozen.supports, changed if cutting else ()), {})

    def with_teacher(state: Any, frozen: step.Frozen, batch: Any, key: Any, rate: Any, teacher: step.Teacher) -> Any:
        params, supports = (
            tree.replace(all_of_it, tree.flatten(part))
            for all_of_it, part in zip(frozen[:2], teacher.frozen[:2], strict=True)
        )
        return one(state, frozen, batch, key, rate, teacher._replace(frozen=step.Frozen(params, supports, {})))

    return with_teacher, (state, frozen, batch, key, rate, step.Teacher(rate, state.trained, own))


def _changed(prune: PruneConfig, model: Model, paths: Sequence[str]) -> set[str]:
    """Return those of ``paths`` whose arrays pruning changes: for a cut, the arrays that may lose rows or columns."""
    if prune.kind not in CUTTING:
        return set(tree.select(prune.targets, paths))
    kinds = [kind for kind in models.cuts(model) if prune.target.kind or getattr(prune, kind)]
    changed = {path for kind in kinds for units in models.cuts(model)[kind] for path in units.axes}
    if prune.hidden or prune.target.hidden:
        changed |= models.hidden_axes(model).keys()
    return changed.intersection(paths)


def _at(values: Any, paths: Container[str]) -> dict[str, Any]:
    """Return the tree of the leaves at those of ``paths`` that it has."""
    return tree.unflatten({path: leaf for path, leaf in tree.flatten(values).items() if path in paths})


def _problem(config: Config, labels: int) -> str:
    """Return the kind of the task, a name of `PROBLEMS`."""
    task = model_task(config)
    if task != "sequence-classification":
        return task
    if config.data.multi_label:
        return "multi_label_classification"
    return "single_label_classification" if labels > 1 else "regression"


def _batch(config: Config, labels: int) -> dict[str, Any]:
    """Return the shapes of a batch of full rows."""
    shape = (config.train.batch_size, config.data.max_length)
    rows = shape[:1]
    answers: dict[str, tuple[tuple[int, ...], Any, tuple[int, ...]]] = {
        "single_label_classification": (rows, jnp.int32, rows),
        "regression": (rows, jnp.float32, rows),
        "multi_label_classification": ((*rows, labels), jnp.float32, rows),
        "token-classification": (shape, jnp.int32, shape),
        "question-answering": ((*rows, 2), jnp.int32, rows),
        "causal-lm": (shape, jnp.int32, shape),
    }
    given, dtype, weights = answers[_problem(config, labels)]
    return {
        **{name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in models.INPUTS},
        "labels": jax.ShapeDtypeStruct(given, dtype),
        "weights": jax.ShapeDtypeStruct(weights, jnp.float32),
    }


def _with_shardings(values: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), values, where)


def plan(config: Config, topology: str = "", *, labels: int = 2) -> dict[str, Any]:
    """Compile the steps of a config for a topology, and return their costs.

    Returns:
      The topology, the mesh, the batch, the number of trained parameters, the bytes of optimiser state against full
      fine-tuning, and the figures of `roofline.analyze` for the training step; under ``evaluate`` those of the evaluation
      step. Where the run distils, ``teacher``: `teacher_bytes`.

    Raises:
      InputError: as `roofline.devices`, `sharding.mesh` and `sharding.placement`.
    """
    devices = roofline.devices(topology)
    steps, placed = abstract_steps(config, devices, labels=labels)
    chip = roofline.CHIPS.get(topology.partition(":")[0])
    state, frozen = steps["train"][1][:2]
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trained))
    backbone = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((frozen.params, state.trained["params"])))
    result: dict[str, Any] = {
        "topology": topology or f"{len(devices)} x {devices[0].device_kind}",
        "devices": len(devices),
        "mesh": dict(placed.mesh.shape),
        "rows": config.train.batch_size,
        "length": config.data.max_length,
        "memory": chip.memory if chip else None,
        "trained": trained,
        "optimizer_bytes": {"this": 8 * trained, "full tuning": 8 * backbone},
    }
    if config.train.distill.weight:
        result["teacher"] = teacher_bytes(*steps["train"][1])
    costs = {name: roofline.analyze(*each, placed.mesh, chip, donated=DONATED[name]) for name, each in steps.items()}
    return result | costs.pop("train") | costs


def teacher_bytes(state: Any, frozen: Any, batch: Any, key: Any, rate: Any, teacher: step.Teacher) -> dict[str, Any]:
    """Return the bytes of a teacher, from the arguments of a step with it.

    Returns:
      ``runs_in_step``; ``bytes_per_chip`` of its arrays that the student does not share: its trained values, and the arrays
      that pruning changes; ``disk_bytes_per_example``, the most that its outputs for an example of ``data.max_length`` tokens
      take. One of the two numbers is 0: outputs come with the batch where the step does not run the teacher.
    """
    del state, frozen, key, rate
    outputs = [batch[name] for name in (distill.OUTPUTS, distill.CLASSES) if name in batch]
    own = [(leaf.sharding.shard_shape(leaf.shape), leaf) for leaf in jax.tree.leaves((teacher.trained, teacher.frozen))]
    return {
        "runs_in_step": not outputs,
        "bytes_per_chip": sum(_nbytes(shape, leaf) for shape, leaf in own),
        "disk_bytes_per_example": sum(_nbytes(leaf.shape[1:], leaf) for leaf in outputs),
    }


def _nbytes(shape: Sequence[int], leaf: Any) -> int:
    """Return the bytes of an array of this shape and of the dtype of ``leaf``."""
    return math.prod(shape) * leaf.dtype.itemsize


def largest_batch(config: Config, topology: str, *, labels: int = 2, most: int = 1 << 16) -> int:
    """Return the most rows of a batch that fit, among the config's batch size doubled or halved; 0 if no size fits.

    Raises:
      InputError: the topology is empty or its chip is unknown, so that its memory is unknown.
    """
    if topology.partition(":")[0] not in roofline.CHIPS:
        raise InputError(f"--largest needs a chip of known memory: give --topology, one of {', '.join(roofline.CHIPS)}")

    def fits(rows: int) -> bool:
        sized = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
        steps, placed = abstract_steps(sized, roofline.devices(topology), labels=labels)
        chip = roofline.CHIPS[topology.partition(":")[0]]
        return all(
            roofline.analyze(*each, placed.mesh, chip, donated=DONATED[name])["fits"] for name, each in steps.items()
        )

    rows = config.train.batch_size
    if fits(rows):
        while rows < most and fits(2 * rows):
            rows *= 2
        return rows
    while rows > 1:
        rows //= 2
        try:
            if fits(rows):
                return rows
        except InputError:
            return 0
    return 0
