"""A compiled step on chips: the memory it takes, its collectives, and the bound on its time by a roofline."""

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


def compiled(
    run: Callable[..., Any], args: Sequence[Any], mesh: Mesh, chip: Chip | None, *, donated: Sequence[int] = ()
) -> dict[str, Any]:
    """Compile a step of abstract arguments over a mesh, and return what it takes.

    Returns:
      operations (of all chips), bytes of a chip (arguments, temporaries, results, code, and what is there at most against its
      memory), bytes read and written and sent, every collective, the roofline and what bounds it. Where the compiler finds
      that it does not fit, no more than how much it would take.
    """
    products, sizes = hlo.multiply_adds(run, *args), dict(mesh.shape)
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
    rows, traffic = hlo.collectives(text, sizes), hlo.traffic(text)
    result |= {
        "fits": bool(total <= chip.memory) if chip else None,
        "compile_seconds": time.perf_counter() - begin,
        "bytes_per_chip": {**bytes_of, "total": total},
        "traffic_bytes_per_chip": traffic,
        "sent_bytes_per_chip": sum(hlo.wire(row, sizes) for row in rows),
        "collectives": [row._asdict() for row in rows],
        "loops_of_unknown_length": hlo.unknown_loops(text),
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


def _sending(rows: Sequence[hlo.Collective], mesh: Mesh, chip: Chip) -> float:
    """Return the seconds that sending takes at least: what goes over different mesh axes goes at the same time."""
    sizes, seconds = dict(mesh.shape), dict[tuple[str, ...], float]()
    for row in rows:
        links = chip.links * (_dimensions(mesh, row.axes) or 1) / chip.dimensions
        seconds[row.axes] = seconds.get(row.axes, 0.0) + hlo.wire(row, sizes) / links
    return max(seconds.values(), default=0.0)


def _dimensions(mesh: Mesh, axes: Sequence[str]) -> int:
    """Return how many dimensions of the torus the devices along some mesh axes lie in."""
    places = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    coords = np.array([device.coords for device in np.ravel(mesh.devices[places])])
    return int((coords != coords[0]).any(0).sum())


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
