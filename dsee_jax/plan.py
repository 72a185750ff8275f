"""What a run will take, before it is paid for: its real steps compiled ahead of time, with no weights and no data.

The config of the run says all but where: the devices here, or a TPU topology that need not be there (``v5e:16x16``; the extra
`tpu` brings libtpu, whose compiler runs on any machine). Memory is the compiler's own estimate for the step of the stage tune;
a run holds more for a while: pruned weights beside whole ones, and with ``train.full`` a second state as it is saved. Time is
a roofline: the longest of computing, of moving bytes within a chip's memory and of sending them between chips, each at the
full rate of `CHIPS`; a real step takes longer.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.table import Table

from dsee_jax import config as configs
from dsee_jax import deltas as delta_trees
from dsee_jax import evaluation, models, optim, program, setup, sharding, step, training, tree
from dsee_jax.ckpt import hf
from dsee_jax.config import Config
from dsee_jax.errors import InputError, did_you_mean


class Chip(NamedTuple):
    """One accelerator at its best."""

    memory: float  # bytes that a program may have
    flops: float  # a second, bfloat16
    bandwidth: float  # bytes a second, of its memory
    links: float  # bytes a second, one way, over all links between chips
    dimensions: int  # of the torus that the links make


_GIB = 2.0**30
CHIPS: dict[str, Chip] = {
    "v5e": Chip(15.75 * _GIB, 197e12, 819e9, 200e9, 2),
    "v5p": Chip(95 * _GIB, 459e12, 2765e9, 600e9, 3),
    "v6e": Chip(31.25 * _GIB, 918e12, 1640e9, 400e9, 2),
}
"""From Google's pages on each, cloud.google.com/tpu/docs/v5e, v5p, v6e: peak compute, memory bandwidth, and half of the
bidirectional bandwidth between chips (400, 1200 and 800 GB/s). The memory of v5e and v6e is what their compiler allows."""


DONATED = {"train": (0,), "evaluate": ()}
"""The arguments of each step that its results take the place of."""

SHOWN = 12
"""Lines of collectives in a terminal; the JSON has all."""


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


Step: TypeAlias = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function, and its arguments as shapes with shardings."""


def abstract(config: Config, found: list[Any], *, labels: int = 2) -> tuple[dict[str, Step], sharding.Placement]:
    """Return the steps of a config over devices, ``train`` and ``evaluate``, and where params lie.

    ``model.path`` may be a folder with a ``config.json`` alone. Every row is as long as ``data.max_length``; ``labels`` are
    those of a classifier.
    """
    configs.check(config)
    where = sharding.mesh(config.mesh, batch_size=config.train.batch_size, devices=found)
    task, asked = configs.model_task(config), config.model
    model = hf.described(asked.path, task, labels, dtype=asked.dtype, scan=asked.scan, remat=asked.remat)
    if config.train.dropout >= 0:
        model = model.clone(config=model.config.with_dropout(config.train.dropout))
    setup.check_length(config, asked.path, model)
    placed = sharding.placement(where, model)
    kind = jnp.dtype(asked.param_dtype)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, kind), models.shapes(model))
    updates, supports = jax.eval_shape(lambda p: delta_trees.init(p, config.delta, key=jax.random.key(0)), params)
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
    causal = task == "causal-lm"
    run = training.step(model, optimizer, config, placed, regression=labels == 1 and not causal)
    predict = evaluation.predictor(model, config, placed, causal=causal)
    return {"train": (run, args), "evaluate": (predict, (args[0].trained, *args[1:3]))}, placed


def _lying(values: Any, where: Any) -> Any:
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), values, where)


def plan(config: Config, topology: str = "", *, labels: int = 2) -> dict[str, Any]:
    """Compile the steps of a config for a topology, and return what they take.

    Returns:
      what is trained against full tuning, and what `compiled` says of the training step; the same of the step that evaluates
      below ``evaluate``.

    Raises:
      InputError: as `devices`, `sharding.mesh` and `sharding.placement` do.
    """
    found = devices(topology)
    steps, placed = abstract(config, found, labels=labels)
    chip = CHIPS.get(topology.partition(":")[0])
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
    taken = {name: compiled(*each, placed.mesh, chip, donated=DONATED[name]) for name, each in steps.items()}
    return result | taken.pop("train") | taken


def compiled(
    run: Callable[..., Any], args: Sequence[Any], mesh: Mesh, chip: Chip | None, *, donated: Sequence[int] = ()
) -> dict[str, Any]:
    """Compile a step of abstract arguments over a mesh, and return what it takes.

    Returns:
      operations (of all chips), bytes of a chip (arguments, temporaries, results, code, and what is there at most against its
      memory), bytes read and written and sent, every collective, the roofline and what bounds it. Where the compiler finds
      that it does not fit, no more than how much it would take.
    """
    products, sizes = program.multiply_adds(run, *args), dict(mesh.shape)
    result: dict[str, Any] = {"flops": 2 * products}
    begin = time.perf_counter()
    try:
        made = jax.jit(run, donate_argnums=tuple(donated)).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler of TPUs gives up on what does not fit.
        used = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of|temporaries \(([\d.]+)([KMGT]?)\) exceeds", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        amount, unit = used.groups()[:2] if used[1] else used.groups()[2:]
        total = float(amount) * 1024 ** " KMGT".index(unit or " ")
        return result | {"fits": False, "bytes_per_chip": {"total": total}}
    memory, text = made.memory_analysis(), made.as_text()
    assert memory is not None, "the compiler says nothing of memory"
    assert text is not None, "the compiler gives no text"
    bytes_of = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # What is donated lies where it came from.
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(bytes_of.values())
    # Not all of it is there at the same time. What XLA calls the peak leaves temporaries out on CPUs.
    if memory.peak_memory_in_bytes and mesh.devices.flat[0].platform != "cpu":
        total = min(total, memory.peak_memory_in_bytes + bytes_of["code"])
    rows, traffic = program.collectives(text, sizes), program.traffic(text)
    result |= {
        "fits": bool(total <= chip.memory) if chip else None,
        "compile_seconds": time.perf_counter() - begin,
        "bytes_per_chip": {**bytes_of, "total": total},
        "traffic_bytes_per_chip": traffic,
        "sent_bytes_per_chip": sum(program.wire(row, sizes) for row in rows),
        "collectives": [row._asdict() for row in rows],
        "loops_of_unknown_length": program.unknown_loops(text),
    }
    if chip:
        times = {
            "computing": 2 * products / mesh.size / chip.flops,
            "memory": traffic / chip.bandwidth,
            "links": _sending(rows, mesh, chip),
        }
        bound = max(times, key=lambda name: times[name])
        result["roofline"] = {"seconds": times, "bound": bound, "step_seconds": times[bound]}
    return result


def _sending(rows: Sequence[program.Collective], mesh: Mesh, chip: Chip) -> float:
    """Return the seconds that sending takes at least: what goes over different mesh axes goes at the same time."""
    sizes, seconds = dict(mesh.shape), dict[tuple[str, ...], float]()
    for row in rows:
        links = chip.links * (_dimensions(mesh, row.axes) or 1) / chip.dimensions
        seconds[row.axes] = seconds.get(row.axes, 0.0) + program.wire(row, sizes) / links
    return max(seconds.values(), default=0.0)


def _dimensions(mesh: Mesh, axes: Sequence[str]) -> int:
    """Return how many dimensions of the torus the devices along some mesh axes lie in."""
    places = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    coords = np.array([device.coords for device in np.ravel(mesh.devices[places])])
    return int((coords != coords[0]).any(0).sum())


def largest(config: Config, topology: str, *, labels: int = 2, most: int = 1 << 16) -> int:
    """Return the most rows of a batch that fit, of the config's own number doubled or halved; 0 where none do.

    Raises:
      InputError: nobody knows the memory of the devices here; name a topology.
    """
    if topology.partition(":")[0] not in CHIPS:
        raise InputError(f"--largest needs a chip whose memory is known: give --topology, one of {', '.join(CHIPS)}")

    def fits(rows: int) -> bool:
        asked = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=rows))
        steps, placed = abstract(asked, devices(topology), labels=labels)
        chip = CHIPS[topology.partition(":")[0]]
        return all(compiled(*each, placed.mesh, chip, donated=DONATED[name])["fits"] for name, each in steps.items())

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


def tables(found: Mapping[str, Any], *, title: str = "a step") -> list[Table]:
    """Return what `plan` found, or `compiled` of anything else, for a terminal."""
    memory = Table(title=f"a chip of {found['topology']}", title_justify="left", show_header=False)
    for name, size in found["bytes_per_chip"].items():
        memory.add_row(name, _bytes(size))
    if found["memory"]:
        memory.add_row("its memory", f"{_bytes(found['memory'])}: {'fits' if found['fits'] else 'does not fit'}")
    if "evaluate" in found:
        scored = found["evaluate"]
        lacking = "" if scored["fits"] in (True, None) else ": does not fit"
        memory.add_row("where it evaluates, total", _bytes(scored["bytes_per_chip"]["total"]) + lacking)
    costs = Table(title=title, title_justify="left", show_header=False)
    costs.add_row("mesh", " x ".join(f"{name} {size}" for name, size in found["mesh"].items()))
    if "rows" in found:
        costs.add_row("batch", f"{found['rows']} rows of {found['length']} tokens")
    if "largest_batch" in found:
        costs.add_row("largest batch that fits", str(found["largest_batch"]))
    if found["flops"]:
        costs.add_row("floating point operations, all chips", f"{found['flops']:.3g}")
    if "collectives" in found:
        costs.add_row("read and written by a chip", _bytes(found["traffic_bytes_per_chip"]))
        costs.add_row("sent by a chip", _bytes(found["sent_bytes_per_chip"]))
    if "roofline" in found:
        for name, seconds in found["roofline"]["seconds"].items():
            bound = " (the bound)" if name == found["roofline"]["bound"] else ""
            costs.add_row(f"time of {name}{bound}", f"{1e3 * seconds:.3g} ms")
    if "roofline" in found.get("evaluate", {}):
        roofline = found["evaluate"]["roofline"]
        seconds = f"{1e3 * roofline['step_seconds']:.3g} ms ({roofline['bound']})"
        costs.add_row("time of a step that evaluates", seconds)
    if "trained" in found:
        costs.add_row("trained", f"{found['trained']:,}")
        state = found["optimizer_bytes"]
        costs.add_row(
            "optimiser state, all chips", f"{_bytes(state['this'])}; full tuning {_bytes(state['full tuning'])}"
        )
    sent = Table(
        "collective", "mesh axes", "of each device", "times", "bytes", title="between chips", title_justify="left"
    )
    rows = found.get("collectives", [])
    for row in rows[:SHOWN]:
        sent.add_row(row["kind"], ", ".join(row["axes"]), row["shape"], str(row["count"]), _bytes(row["bytes"]))
    if len(rows) > SHOWN:
        sent.add_row(f"and {len(rows) - SHOWN} more", "", "", "", _bytes(sum(row["bytes"] for row in rows[SHOWN:])))
    return [memory, costs, sent]


def _bytes(size: float) -> str:
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:.3g} {unit}"
    return f"{size:.0f} bytes"
