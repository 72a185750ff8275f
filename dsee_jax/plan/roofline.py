"""Memory, FLOPs and collectives of a compiled step on accelerators, and a lower bound on its time by a roofline."""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.table import Table

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.plan import hlo
from dsee_jax.runtime import console


class Chip(NamedTuple):
    """The peak rates of one accelerator."""

    memory: float  # bytes available to a program
    flops: float  # FLOPs per second, bfloat16
    bandwidth: float  # bytes per second of its memory
    links: float  # bytes per second, one way, over all links between chips
    dimensions: int  # of the torus of links


_GIB = 2.0**30
CHIPS: dict[str, Chip] = {
    "v5e": Chip(15.75 * _GIB, 197e12, 819e9, 200e9, 2),
    "v5p": Chip(95 * _GIB, 459e12, 2765e9, 600e9, 3),
    "v6e": Chip(31.25 * _GIB, 918e12, 1640e9, 400e9, 2),
}
"""From cloud.google.com/tpu/docs/v5e, v5p, v6e: peak compute, memory bandwidth, and half of the bidirectional bandwidth
between chips (400, 1200 and 800 GB/s). The memory of v5e and v6e is the limit of their compiler."""

SHOWN = 12
"""Rows of collectives in a terminal; the JSON has all of them."""


def devices(topology: str) -> list[Any]:
    """Return the devices of a TPU topology such as ``v5e:4x4``, also one you do not have; for "" the local devices.

    Raises:
      InputError: the chip is unknown, libtpu is not installed, or the topology does not exist.
    """
    if not topology:
        return jax.devices()
    kind = topology.partition(":")[0]
    if kind not in CHIPS:
        raise InputError(
            f"--topology {topology!r}: unknown chip{did_you_mean(kind, CHIPS)}; expected KIND:SHAPE with one of "
            f"{', '.join(CHIPS)}, for instance v5e:4x4 or v5p:4x4x8"
        )
    # libtpu otherwise waits for a cloud's metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # the plugin can raise any exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--topology {topology!r} is not available ({reason}): install the extra `tpu` (pip install '.[tpu]'), and use a "
            "shape that exists, for instance v5e:4x4, v5e:16x16, v6e:16x16, v5p:4x4x8"
        ) from None


def analyze(
    run: Callable[..., Any], args: Sequence[Any], mesh: Mesh, chip: Chip | None, *, donated: Sequence[int] = ()
) -> dict[str, Any]:
    """Compile a step ahead of time and return its costs.

    Args:
      run: the step.
      args: its arguments, shapes with shardings.
      mesh: the mesh of these shardings.
      chip: the accelerator; None for an unknown one.
      donated: indices of the arguments whose memory the results reuse.

    Returns:
      ``flops`` of all chips; ``bytes_per_chip``: arguments, temporaries, results, code, and ``total``, the peak; ``fits``,
      None for an unknown chip; memory traffic and sent bytes per chip; every collective; for a known chip the roofline and
      its bound. If the compiler runs out of memory: only ``flops``, ``fits`` and the ``total``.
    """
    products, sizes = hlo.multiply_adds(run, *args), dict(mesh.shape)
    result: dict[str, Any] = {"flops": 2 * products}
    begin = time.perf_counter()
    try:
        program = jax.jit(run, donate_argnums=tuple(donated)).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        # The TPU compiler fails if a program does not fit; its message has the bytes.
        used = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of|temporaries \(([\d.]+)([KMGT]?)\) exceeds", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not used:
            raise
        amount, unit = used.groups()[:2] if used[1] else used.groups()[2:]
        total = float(amount) * 1024 ** " KMGT".index(unit or " ")
        return result | {"fits": False, "bytes_per_chip": {"total": total}}
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None, "the compiler has no memory analysis"
    assert text is not None, "the compiler has no HLO text"
    bytes_of = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        # Results that alias donated arguments need no memory of their own.
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(bytes_of.values())
    # These bytes are not all live at once. On CPUs XLA's peak excludes temporaries.
    if memory.peak_memory_in_bytes and mesh.devices.flat[0].platform != "cpu":
        total = min(total, memory.peak_memory_in_bytes + bytes_of["code"])
    rows, traffic = hlo.collectives(text, sizes), hlo.traffic(text)
    result |= {
        "fits": bool(total <= chip.memory) if chip else None,
        "compile_seconds": time.perf_counter() - begin,
        "bytes_per_chip": {**bytes_of, "total": total},
        "traffic_bytes_per_chip": traffic,
        "sent_bytes_per_chip": sum(hlo.bytes_sent(row, sizes) for row in rows),
        "collectives": [row._asdict() for row in rows],
        "loops_of_unknown_length": hlo.unknown_loops(text),
    }
    if chip:
        times = {
            "compute": 2 * products / mesh.size / chip.flops,
            "memory": traffic / chip.bandwidth,
            "links": _link_seconds(rows, mesh, chip),
        }
        bound = max(times, key=lambda name: times[name])
        result["roofline"] = {"seconds": times, "bound": bound, "step_seconds": times[bound]}
    return result


def _link_seconds(rows: Sequence[hlo.Collective], mesh: Mesh, chip: Chip) -> float:
    """Return a lower bound on the seconds of all collectives; those over different sets of mesh axes overlap."""
    sizes, seconds = dict(mesh.shape), dict[tuple[str, ...], float]()
    for row in rows:
        links = chip.links * (_dimensions(mesh, row.axes) or 1) / chip.dimensions
        seconds[row.axes] = seconds.get(row.axes, 0.0) + hlo.bytes_sent(row, sizes) / links
    return max(seconds.values(), default=0.0)


def _dimensions(mesh: Mesh, axes: Sequence[str]) -> int:
    """Return the number of torus dimensions along which the devices of some mesh axes extend."""
    places = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    coords = np.array([device.coords for device in np.ravel(mesh.devices[places])])
    return int((coords != coords[0]).any(0).sum())


def tables(figures: Mapping[str, Any], *, title: str = "per step") -> list[Table]:
    """Return the tables of memory, costs and collectives, from the figures of `dsee_jax.plan.run.plan` or of `analyze`."""
    memory = Table(title=f"bytes per chip, {figures['topology']}", title_justify="left", show_header=False)
    for name, count in figures["bytes_per_chip"].items():
        memory.add_row(name, console.size(count))
    if figures["memory"]:
        verdict = "fits" if figures["fits"] else "does not fit"
        memory.add_row("memory of a chip", f"{console.size(figures['memory'])}: {verdict}")
    if "evaluate" in figures:
        evaluation = figures["evaluate"]
        verdict = "" if evaluation["fits"] in (True, None) else ": does not fit"
        memory.add_row("total of an evaluation step", console.size(evaluation["bytes_per_chip"]["total"]) + verdict)
    if teacher := figures.get("teacher"):
        own = f"{console.size(teacher['bytes_per_chip'])} of the arguments; each step runs it"
        kept = f"at most {console.size(teacher['disk_bytes_per_example'])} on disk per example"
        memory.add_row("teacher", own if teacher["runs_in_step"] else kept)
    costs = Table(title=title, title_justify="left", show_header=False)
    costs.add_row("mesh", " x ".join(f"{name} {size}" for name, size in figures["mesh"].items()))
    if "rows" in figures:
        costs.add_row("batch", f"{figures['rows']} rows of {figures['length']} tokens")
    if "largest_batch" in figures:
        costs.add_row("largest batch that fits", str(figures["largest_batch"]))
    if figures["flops"]:
        costs.add_row("FLOPs, all chips", f"{figures['flops']:.3g}")
    if "collectives" in figures:
        costs.add_row("memory traffic per chip", console.size(figures["traffic_bytes_per_chip"]))
        costs.add_row("sent per chip", console.size(figures["sent_bytes_per_chip"]))
    if "roofline" in figures:
        for name, seconds in figures["roofline"]["seconds"].items():
            bound = " (bound)" if name == figures["roofline"]["bound"] else ""
            costs.add_row(f"time of {name}{bound}", f"{1e3 * seconds:.3g} ms")
    if "roofline" in figures.get("evaluate", {}):
        roofline = figures["evaluate"]["roofline"]
        seconds = f"{1e3 * roofline['step_seconds']:.3g} ms ({roofline['bound']})"
        costs.add_row("time of an evaluation step", seconds)
    if "trained" in figures:
        costs.add_row("trained parameters", f"{figures['trained']:,}")
        this, full = (console.size(figures["optimizer_bytes"][name]) for name in ("this", "full tuning"))
        costs.add_row("optimiser state, all chips", f"{this}; full fine-tuning {full}")
    sent = Table(
        *("collective", "mesh axes", "result per chip", "count", "bytes"),
        title="collectives",
        title_justify="left",
    )
    rows = figures.get("collectives", [])
    for row in rows[:SHOWN]:
        sent.add_row(row["kind"], ", ".join(row["axes"]), row["shape"], str(row["count"]), console.size(row["bytes"]))
    if len(rows) > SHOWN:
        sent.add_row(f"{len(rows) - SHOWN} more", "", "", "", console.size(sum(row["bytes"] for row in rows[SHOWN:])))
    return [memory, costs, sent]
