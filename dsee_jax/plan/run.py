"""What a run will take, before it is paid for: its real steps compiled ahead of time, with no weights and no data.

The config of the run says all but where: the devices here, or a TPU topology that need not be there (``v5e:16x16``; the extra
`tpu` brings libtpu, whose compiler runs on any machine). Memory is the compiler's own estimate for the step of the stage tune;
a run holds more for a while: pruned weights beside whole ones, and with ``train.full`` a second state as it is saved. Time is
a roofline: the longest of computing, of moving bytes within a chip's memory and of sending them between chips, each at the
full rate of `roofline.CHIPS`; a real step takes longer.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dsee_jax import models, tree
from dsee_jax.ckpt import hf
from dsee_jax.config import Config, check, model_task
from dsee_jax.deltas import create
from dsee_jax.errors import InputError
from dsee_jax.plan import roofline
from dsee_jax.train import evaluation, inputs, optim, programs, setup, sharding, step

DONATED = {"train": (0,), "evaluate": ()}
"""The arguments of each step that its results take the place of."""


Step: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function, and its arguments as shapes with shardings."""


def abstract(config: Config, found: list[Any], *, labels: int = 2) -> tuple[dict[str, Step], sharding.Placement]:
    """Return the steps of a config over devices, ``train`` and ``evaluate``, and where params lie.

    ``model.path`` may be a folder with a ``config.json`` alone. Every row is as long as ``data.max_length``; ``labels`` are
    those of a classifier.
    """
    check(config)
    where = sharding.mesh(config.mesh, batch_size=config.train.batch_size, devices=found)
    task, asked = model_task(config), config.model
    model = hf.abstract_model(asked.path, task, labels, dtype=asked.dtype, scan=asked.scan, remat=asked.remat)
    if config.train.dropout >= 0:
        model = model.clone(config=model.config.with_dropout(config.train.dropout))
    inputs.check_length(config, asked.path, model)
    placed = sharding.placement(where, model)
    kind = jnp.dtype(asked.param_dtype)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), models.shapes(model))
    updates, supports = jax.eval_shape(lambda p: create.init(p, config.delta, key=jax.random.key(0)), params)
    _, moving = setup.trains(config, model, params)
    rest = tree.split(params, list(tree.flatten(moving)))[1]
    wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), moving)
    optimizer = optim.adamw(config.train)
    state = jax.eval_shape(
        lambda trained: step.State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained)),
        {"deltas": updates, "params": wide},
    )
    shape = (config.train.batch_size, config.data.max_length)
    answers = shape if task == "causal-lm" else shape[:1]
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in models.INPUTS}
    batch["labels"] = jax.ShapeDtypeStruct(answers, jnp.float32 if labels == 1 and answers != shape else jnp.int32)
    batch["weights"] = jax.ShapeDtypeStruct(answers, jnp.float32)
    whole = NamedSharding(where, PartitionSpec())
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    args = (
        _lying(state, sharding.shardings(placed, state)),
        _lying(frozen := step.Frozen(rest, supports, {}), sharding.shardings(placed, frozen)),
        _lying(batch, dict.fromkeys(batch, NamedSharding(where, PartitionSpec(sharding.ROWS)))),
        _lying(key, whole),
        _lying(jax.ShapeDtypeStruct((), jnp.float32), whole),
    )
    causal = task == "causal-lm"
    run = programs.sharded_step(model, optimizer, config, placed, regression=labels == 1 and not causal)
    predict = evaluation.predictor(model, config, placed, causal=causal)
    return {"train": (run, args), "evaluate": (predict, (args[0].trained, *args[1:3]))}, placed


def _lying(values: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), values, where)


def plan(config: Config, topology: str = "", *, labels: int = 2) -> dict[str, Any]:
    """Compile the steps of a config for a topology, and return what they take.

    Returns:
      The trained parameters against full tuning and what `roofline.compiled` returns of the training step; under ``evaluate``
      the same of the evaluation step.

    Raises:
      InputError: as `roofline.devices`, `sharding.mesh` and `sharding.placement` do.
    """
    found = roofline.devices(topology)
    steps, placed = abstract(config, found, labels=labels)
    chip = roofline.CHIPS.get(topology.partition(":")[0])
    state, frozen = steps["train"][1][:2]
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.trained))
    backbone = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((frozen.params, state.trained["params"])))
    result: dict[str, Any] = {
        "topology": topology or f"{len(found)} x {found[0].device_kind}",
        "devices": len(found),
        "mesh": dict(placed.mesh.shape),
        "rows": config.train.batch_size,
        "length": config.data.max_length,
        "memory": chip.memory if chip else None,
        "trained": trained,
        "optimizer_bytes": {"this": 8 * trained, "full tuning": 8 * backbone},
    }
    taken = {name: roofline.compiled(*each, placed.mesh, chip, donated=DONATED[name]) for name, each in steps.items()}
    return result | taken.pop("train") | taken


def largest(config: Config, topology: str, *, labels: int = 2, most: int = 1 << 16) -> int:
    """Return the most rows of a batch that fit, of the config's own number doubled or halved; 0 where none do.

    Raises:
      InputError: nobody knows the memory of the devices here; name a topology.
    """
    if topology.partition(":")[0] not in roofline.CHIPS:
        raise InputError(
            f"--largest needs a chip whose memory is known: give --topology, one of {', '.join(roofline.CHIPS)}"
        )

    def fits(rows: int) -> bool:
        asked = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
        steps, placed = abstract(asked, roofline.devices(topology), labels=labels)
        chip = roofline.CHIPS[topology.partition(":")[0]]
        return all(
            roofline.compiled(*each, placed.mesh, chip, donated=DONATED[name])["fits"] for name, each in steps.items()
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
