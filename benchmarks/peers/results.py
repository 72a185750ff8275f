"""The figures of the questions: medians and ratios of pairs, one JSON file per question, and tables in Markdown."""

import datetime
import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import runs
from benchmarks.peers import shapes
from benchmarks.peers.questions import Question
from dsee_jax.runtime import atomic

FOLDER = Path(__file__).parents[1] / "results" / "peers"

BUSY = 0.1
"""The cores that other processes may use while a complete record is measured."""


class State(NamedTuple):
    """The code and the packages of a measurement: figures of another state are measured again."""

    sources: Mapping[str, str]
    """The digests of the measured packages of this checkout, and of the modules of the sides, by name."""
    packages: Mapping[str, str]
    """By side: the versions of Python and of the packages that decide its speed."""


def ratio(ours: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Return the median of the ratios of equal rounds, their range, and the ratios: ours over the other."""
    pairs = [a / b for a, b in zip(ours, other, strict=True)]
    return {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs), "pairs": pairs}


def record(
    question: Question,
    case: Mapping[str, Any],
    sides: Mapping[str, Mapping[str, Any]],
    *,
    pairs: int,
    machine: Mapping[str, Any],
    state: State,
    busy: float | None = None,
) -> dict[str, Any]:
    """Return the record of a case from the answers of `rounds.measure`; ``busy``: the cores that other processes used."""
    done: dict[str, dict[str, Any]] = {name: dict(side) for name, side in sides.items()}
    checked = next(iter(sides.values())).get("check", {})
    rates = [
        round["matmul_flops_per_second"]
        for side in sides.values()
        for round in side.get("rounds", [])[:1]
        if "matmul_flops_per_second" in round
    ]
    for name, side in done.items():
        if "error" in side:
            continue
        side["compared"] = sorted(checked.keys() & side.pop("check").keys())
        side |= {"options": dict(question.sides[name].options), "packages": state.packages[name]}
        figures = [each for each in (*question.metrics, *question.scores) if each in side["rounds"][0]]
        side["medians"] = {each: statistics.median(round[each] for round in side["rounds"]) for each in figures}
        if question.training and rates:
            # Forward, and a backward pass without gradients of kernels, which costs as much.
            flops = 2 * shapes.flops(case["shape"], case["batch"], case["length"])
            side["mfu"] = flops / side["medians"]["seconds"] / max(rates)
    ratios = {}
    for name, other in question.pairs():
        if all(each in done and "error" not in done[each] for each in (name, other)):
            ratios[f"{name}/{other}"] = {
                metric: ratio(*([each[metric] for each in done[side]["rounds"]] for side in (name, other)))
                for metric in question.metrics
                if all(metric in done[side]["medians"] for side in (name, other))
            }
    return {
        "settings": dict(case),
        "pairs": pairs,
        "machine": dict(machine),
        "sources": dict(state.sources),
        "cores_of_others": busy,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "ratios": ratios,
        "sides": done,
    }


def changes(
    stored: Mapping[str, Any], question: Question, case: Mapping[str, Any], *, machine: Mapping[str, Any], state: State
) -> list[str]:
    """Return what differs from the state in which a stored record was measured: nothing for a current record."""
    now = {"settings": dict(case), "machine": dict(machine), "sources": dict(state.sources)}
    found = [key for key, value in now.items() if stored.get(key) != value]
    for name, packages in state.packages.items():
        side = stored["sides"].get(name, {"error": ""})
        if "error" not in side:
            now = {"options": dict(question.sides[name].options), "packages": packages}
            found += [f"{key} of {name}" for key, value in now.items() if side.get(key) != value]
    return found


def lost(stored: Mapping[str, Any] | None, question: Question, sides: Collection[str], pairs: int) -> str:
    """Return what a record of these sides and pairs lacks of a stored one, whose place it would take; "" for nothing."""
    if stored is None:
        return ""
    good = [name for name, side in stored["sides"].items() if "error" not in side and name in question.sides]
    if missing := [name for name in good if name not in sides]:
        return f"has the side{'s' * (len(missing) > 1)} {', '.join(missing)}"
    return f"has {stored['pairs']} pairs" if good and stored["pairs"] > pairs else ""


def beside(stored: Mapping[str, Any]) -> str:
    """Return beside how much other work a record was measured, "" for an idle machine."""
    cores = stored.get("cores_of_others") or 0.0
    return f"measured beside other work on {cores:.1f} cores" if cores > BUSY else ""


def is_complete(stored: Mapping[str, Any] | None, sides: Iterable[str], pairs: int) -> bool:
    """Return whether a stored record is of an idle machine, has enough pairs, and every side without an error."""
    if stored is None or stored["pairs"] < pairs or beside(stored):
        return False
    return all(name in stored["sides"] and "error" not in stored["sides"][name] for name in sides)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of a question by case; {} without a file."""
    return json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}


def write(path: Path, question: Question, cases: Mapping[str, Any]) -> None:
    """Write the records of a question, completely or not at all."""
    content = {"title": question.title, "about": question.about, "cases": dict(cases)}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def tables(questions: Mapping[str, Question], folder: Path) -> str:
    """Return the tables of the stored questions in Markdown, in the order of ``questions``."""
    texts = [table(each, cases) for name, each in questions.items() if (cases := read(folder / f"{name}.json"))]
    return "\n".join(texts)


def table(question: Question, cases: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of a question: a row per case and metric, a column per ratio."""
    titles = {name: side.title for name, side in question.sides.items()}
    first, *_ = question.sides
    columns = [
        titles[other] if name == first else f"{titles[name]} / {titles[other]}" for name, other in question.pairs()
    ]
    heads = ["case", titles[first], *columns]
    # Cases in the order of the question; the file may have older ones too.
    shown = {title: cases[title] for title in question.cases if title in cases}
    rows = (_row(question, title, each, metric) for title, each in shown.items() for metric in question.metrics)
    machines = dict.fromkeys(map(_machine, shown.values()))
    pairs = min((each["pairs"] for each in shown.values()), default=0)
    note = (
        f"{question.about} A ratio is {titles[first]} over the peer, unless the column names both sides: the median of "
        f"{pairs} pairs or more, measured in turns (in brackets the least and the most), beside the peer's own figure."
    )
    return "\n".join([f"**{question.title}** ({'; '.join(machines)})", "", *runs.table(heads, rows), note, ""])


def _machine(case: Mapping[str, Any]) -> str:
    machine = case["machine"]
    devices = {side["facts"].get("device") for side in case["sides"].values() if "facts" in side}
    card = [device for device in devices if device and device != "cpu"]
    return card[0] if card else f"{machine['cpu']}, {machine['threads']} cores"


def _row(question: Question, title: str, case: Mapping[str, Any], metric: str) -> list[str]:
    first, *_ = question.sides
    label = title if metric == "seconds" else f"{title}: memory"
    if work := beside(case):
        label += f" ({work})"
    cells = [label, _side(question, case["sides"][first], metric)]
    for name, other in question.pairs():
        found = case["ratios"].get(f"{name}/{other}", {}).get(metric)
        if found is None:
            cells.append("")
            continue
        # The figure that the reader has not seen yet.
        unseen = case["sides"][name if other == first else other]
        median, least, most = (_times(found[each]) for each in ("median", "least", "most"))
        cells.append(f"**{median}** ({least} to {most}), {_side(question, unseen, metric)}")
    return cells


def _times(ratio: float) -> str:
    """Return a ratio with two decimals, with none from 10 on, and with two digits below 0.1."""
    return f"{ratio:.2g}" if ratio < 0.1 else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _side(question: Question, side: Mapping[str, Any], metric: str) -> str:
    """Return the figure of a side, with its scores and MFU beside its seconds."""
    if "error" in side:
        return "failed"
    if metric not in side["medians"]:
        return ""
    text = shown(side["medians"][metric], metric)
    if metric != "seconds":
        return text
    for name in question.scores:
        values = [each[name] for each in side["rounds"]]
        text += f", {name} {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
    return text + (f", MFU {side['mfu']:.0%}" if "mfu" in side else "")


def shown(value: float, metric: str) -> str:
    """Return a figure with its unit."""
    if metric.endswith("bytes"):
        return f"{value / 1e9:.2f} GB"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
