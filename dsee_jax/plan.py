"""What a run will take, before it is paid for: its real step compiled ahead of time, with no weights and no data.

The config of the run says all but where: the devices here, or a TPU topology that need not be there (``v5e:16x16``; the extra
`tpu` brings libtpu, whose compiler runs on any machine). Memory is what the compiler says of the program. Time is a roofline:
the longest of computing, of moving bytes within a chip's memory and of sending them between chips, each at the full rate of
`CHIPS`; a real step takes longer.
"""

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.table import Table

from dsee_jax import config as configs
from dsee_jax import deltas as delta_trees
from dsee_jax import models, optim, program, sharding, step, training, tree
from dsee_jax.ckpt import hf
from dsee_jax.config import Config
from dsee_jax.errors import InputError, did_you_mean


class Chip(NamedTuple):
    """One accelerator at its best."""

    memory: float  # bytes
    flops: float  # a second, bfloat16
    bandwidth: float  # bytes a second, of its memory
    links: float  # bytes a second, one way, over all links between chips
    dimensions: int  # of the torus that the links make


CHIPS: dict[str, Chip] = {
    "v4": Chip(32e9, 275e12, 1228e9, 150e9, 3),
    "v5e": Chip(16e9, 197e12, 819e9, 100e9, 2),
    "v5p": Chip(95e9, 459e12, 2765e9, 300e9, 3),
    "v6e": Chip(32e9, 918e12, 1640e9, 224e9, 2),
}
"""From Google's pages on each, cloud.google.com/tpu/docs/v4, v5e, v5p, v6e: memory, peak compute, memory bandwidth and half of
the bidirectional bandwidth between chips."""


def devices(topology: str) -> list[Any]:
    """Return the devices of a TPU topology such as ``v5e:4x4``, which need not be there; those here for an empty text.

    Raises:
      InputError: libtpu is not installed, or knows no such topology.
    """
    if not topology:
        return jax.devices()
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise InputError(
            f"--topology {topology!r}: no such chip{did_you_mean(kind, CHIPS)}; expected KIND:SHAPE with one of "
            f"{', '.join(CHIPS)}, for instance v5e:4x4 or v5p:4x4x8"
        )
    # It asks the machines of a cloud where it is, and waits long where there are none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # whatever the plugin raises
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology {topology!r} cannot be had ({reason}): install the extra `tpu` (pip install '.[tpu]'), and give a "
            "shape that is made, for instance v5e:4x4, v5e:16x16, v6e:16x16, v5p:4x4x8"
        ) from None


def abstract(config: Config, found: list[Any], *, labels: int = 2) -> tuple[Any, tuple[Any, ...], sharding.Placement]:
    """Return the training step of a config over devices, its arguments as shapes with shardings, and where params lie.

    ``model.path`` may be a folder with a ``config.json`` alone. Every row is as long as ``data.max_length``; ``labels`` are
    those of a classifier.
    """
    configs.check(config)
    where = sharding.mesh(config.mesh, batch_size=config.train.batch_size, devices=found)
    task, asked = configs.model_task(config), config.model
    model = hf.described(asked.path, task, labels, dtype=asked.dtype, scan=asked.scan, remat=asked.remat)
    placed = sharding.placement(where, model)
    kind = jnp.dtype(asked.param_dtype)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), models.shapes(model))
    updates, supports = jax.eval_shape(lambda p: delta_trees.init(p, config.delta, key=jax.random.key(0)), params)
    head = [] if task == "causal-lm" else tree.select(models.find(model.config.model_type).HEAD, tree.flatten(params))
    moving, rest = (params, {}) if config.train.full else tree.split(params, head)
    wide = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), moving)
    optimizer = optim.adamw(config.train)
    state = jax.eval_shape(
        lambda trained: step.State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained)),
        {"deltas": updates, "params": wide},
    )
    shape = (config.train.batch_size, config.data.max_length)
    answers = shape if task == "causal-lm" else shape[:1]
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in step.INPUTS}
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
    run = training.step(model, optimizer, config, placed, regression=labels == 1 and task != "causal-lm")
    return run, args, placed


def _lying(values: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), values, where)


def plan(config: Config, topology: str = "", *, labels: int = 2) -> dict[str, Any]:
    """Compile the training step of a config for a topology, and return what it takes.

    Returns:
      bytes of a chip (arguments, temporaries, code, and their sum against its memory), multiply-adds and bytes of a step,
      every collective, the roofline and what bounds it, and what is trained against full tuning.

    Raises:
      InputError: as `devices`, `sharding.mesh` and `sharding.placement` do.
    """
    found = devices(topology)
    run, args, placed = abstract(config, found, labels=labels)
    begin = time.perf_counter()
    compiled = jax.jit(run, donate_argnums=0).lower(*args).compile()
    seconds = time.perf_counter() - begin
    memory, text, sizes = compiled.memory_analysis(), compiled.as_text(), dict(placed.mesh.shape)
    chip = CHIPS.get(topology.partition(":")[0])
    bytes_of = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # What is donated lies where it came from.
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(bytes_of.values())
    rows = program.collectives(text, sizes)
    products = program.multiply_adds(run, *args)
    traffic, sent = program.traffic(text), _sent(rows, sizes)
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(args[0].trained))
    frozen = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(args[1].params))
    result = {
        "topology": topology or f"{len(found)} x {found[0].device_kind}",
        "devices": len(found),
        "mesh": sizes,
        "rows": config.train.batch_size,
        "length": config.data.max_length,
        "compile_seconds": seconds,
        "bytes_per_chip": {**bytes_of, "total": total},
        "memory": chip.memory if chip else None,
        "fits": bool(total <= chip.memory) if chip else None,
        "flops": 2 * products,
        "traffic_bytes_per_chip": traffic,
        "sent_bytes_per_chip": sent,
        "collectives": [row._asdict() for row in rows],
        "trained": trained,
        "optimizer_bytes": {"this": 8 * trained, "full tuning": 8 * (trained + frozen)},
    }
    if chip:
        times = {
            "computing": 2 * products / len(found) / chip.flops,
            "memory": traffic / chip.bandwidth,
            # A mesh axis lies along one dimension of the torus, and has the links of that.
            "links": sent / (chip.links / chip.dimensions),
        }
        bound = max(times, key=lambda name: times[name])
        result["roofline"] = {"seconds": times, "bound": bound, "step_seconds": times[bound]}
    return result


def _sent(rows: list[program.Collective], mesh: dict[str, int]) -> float:
    return sum(program.wire(row, mesh) for row in rows)


def largest(config: Config, topology: str, *, labels: int = 2, most: int = 1 << 16) -> int:
    """Return the most rows of a batch that fit, of the config's own number doubled or halved; 0 where none do."""

    def fits(rows: int) -> bool:
        asked = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
        return bool(plan(asked, topology, labels=labels)["fits"])

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


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return what `plan` found, for a terminal."""
    memory = Table(title=f"a chip of {found['topology']}", title_justify="left", show_header=False)
    for name, size in found["bytes_per_chip"].items():
        memory.add_row(name, _bytes(size))
    if found["memory"]:
        memory.add_row("its memory", f"{_bytes(found['memory'])}: {'fits' if found['fits'] else 'does not fit'}")
    costs = Table(title="a step", title_justify="left", show_header=False)
    costs.add_row("mesh", " x ".join(f"{name} {size}" for name, size in found["mesh"].items()))
    costs.add_row("batch", f"{found['rows']} rows of {found['length']} tokens")
    if "largest_batch" in found:
        costs.add_row("largest batch that fits", str(found["largest_batch"]))
    costs.add_row("floating point operations, all chips", f"{found['flops']:.3g}")
    costs.add_row("read and written by a chip", _bytes(found["traffic_bytes_per_chip"]))
    costs.add_row("sent by a chip", _bytes(found["sent_bytes_per_chip"]))
    if "roofline" in found:
        for name, seconds in found["roofline"]["seconds"].items():
            bound = " (the bound)" if name == found["roofline"]["bound"] else ""
            costs.add_row(f"time of {name}{bound}", f"{1e3 * seconds:.3g} ms")
    costs.add_row("trained", f"{found['trained']:,}")
    state = found["optimizer_bytes"]
    costs.add_row("optimiser state, all chips", f"{_bytes(state['this'])}; full tuning {_bytes(state['full tuning'])}")
    sent = Table(
        "collective", "mesh axes", "of each device", "times", "bytes", title="between chips", title_justify="left"
    )
    for row in found["collectives"][:12]:
        sent.add_row(row["kind"], ", ".join(row["axes"]), row["shape"], str(row["count"]), _bytes(row["bytes"]))
    return [memory, costs, sent]


def _bytes(size: float) -> str:
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size:.0f} bytes"
