"""Tables of methods: one row for the records of all seeds (`benchmarks.records`), with intervals and differences.

Rows with other seeds stand in tables of their own: their means do not compare.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import records, runs


def row(kept: Mapping[int, Mapping[str, Any]], length: float | None = None) -> dict[str, Any]:
    """Return the figures of a method on a task from its records by seed; costs are means or, for sizes, the largest.

    FLOPs are of examples of ``length`` tokens, or of the longest ones. Speed is that of the first seed that has it; None where
    it is not measured.
    """
    first = next(iter(kept.values()))
    trained = [record["train_info"] for record in kept.values()]
    speed = next((record["inference_info"] for record in kept.values() if "inference_info" in record), None)
    tokens: float = length or trained[0]["flops_per_example"]["length"]
    flops = [records.flops(record, tokens) for record in kept.values()]
    means = ("trainable_fraction_with_head", "weight_sparsity", "seconds_per_step", "train_time")
    most = ("num_trainable_params", "file_size", "model_bytes", "accelerator_memory_max")
    measured = {name: speed[name] if speed else None for name in ("throughput_ratio", "latency_ratio")}
    measured |= {name: speed["final"][name] if speed else None for name in ("examples_per_second", "latency_seconds")}
    return {
        "score": first["run_info"]["score"],
        "scores": {seed: records.score(record, "test") for seed, record in kept.items()},
        "choices": {seed: records.score(record, "valid") for seed, record in kept.items()},
        **{name: float(np.mean([each[name] for each in trained])) for name in means},
        **{name: max(each[name] for each in trained) for name in most},
        "length": tokens,
        "flops_per_example": float(np.mean([each["final"] for each in flops])),
        "flops_ratio": float(np.mean([each["final"] / each["dense"] for each in flops])),
        **provenance(kept),
        "speed_machine": f"{speed['machine']}, {speed['device']}" if speed else None,
        **measured,
    }


def provenance(kept: Mapping[int, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return ``seeds``, ``machines`` and ``commits`` of the records of a method by seed, and the seeds ``resumed``.

    A record is of the commit at its end; a resumed one understates memory and total time (`benchmarks.records`).
    """
    commits = {record["meta_info"]["package_info"]["dsee_jax-commit-hash"] or "unknown" for record in kept.values()}
    return {
        "seeds": [*kept],
        "machines": sorted({record["run_info"]["machine"] for record in kept.values()}),
        "commits": sorted(commits),
        "resumed": [seed for seed, record in kept.items() if record["run_info"].get("resumed")],
    }


def compared(rows: Iterable[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return the rows with means and intervals, and with the differences from the method ``baseline`` at equal seeds.

    ``mean`` and ``gap`` are of the test half of the dev set, ``choice`` and ``choice_gap`` of the validation half. Means are
    over all seeds of a row, differences over those that the baseline has too; None where it has none of them.
    """
    rows = list(rows)
    base = {(each["model"], each["task"]): each for each in rows if each["method"] == baseline}
    done = []
    for each in rows:
        other = base.get((each["model"], each["task"]), {"scores": {}, "choices": {}})
        gaps, choice_gaps = (
            [value - other[half][seed] for seed, value in each[half].items() if seed in other[half]]
            for half in ("scores", "choices")
        )
        values = [*each["scores"].values()]
        done.append(
            {
                **each,
                "mean": float(np.mean(values)),
                "interval": records.interval(values),
                "choice": float(np.mean([*each["choices"].values()])),
                "gap": float(np.mean(gaps)) if gaps else None,
                "gap_interval": records.interval(gaps),
                "choice_gap": float(np.mean(choice_gaps)) if choice_gaps else None,
            }
        )
    return done


def by_seeds(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the rows in groups of equal seeds, those of the most seeds first."""
    groups: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for each in rows:
        groups.setdefault(tuple(each["seeds"]), []).append(each)
    return sorted(groups.values(), key=lambda group: len(group[0]["seeds"]), reverse=True)


def named(seeds: Sequence[int]) -> str:
    """Return one or more seeds in words."""
    *most, last = map(str, seeds)
    return f"seeds {', '.join(most)} and {last}" if most else f"seed {last}"


HEADS = (
    *("method", "test half", "against LoRA", "validation half", "against LoRA", "trained", "zeros"),
    *("FLOPs", "saved", "throughput", "latency", "memory", "step"),
)
"""The columns of the tables in Markdown."""


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the tables in Markdown, one for each model, task and set of seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in rows:
        groups.setdefault((each["model"], each["task"]), []).append(each)
    text = []
    for group in groups.values():
        about = f"{group[0]['score']} x 100, FLOPs of {round(group[0]['length'])} tokens"
        for block in by_seeds(group):
            head = f"**{group[0]['title']}**, {named(block[0]['seeds'])}: {about}"
            text += [head, "", *runs.table(HEADS, map(_cells, block))]
        text += lines([*_machines(group), *cautions(group)])
    return "\n".join([*text, NOTE]) + "\n"


def lines(sentences: Sequence[str]) -> list[str]:
    """Return the sentences below a table, one per line, and an empty line; [] for none."""
    return [*sentences, ""] if sentences else []


def cautions(group: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sentences about a table whose runs are of several commits, or of several processes (`provenance`)."""
    group, sentences = [*group], []
    commits = {commit for each in group for commit in each["commits"]}
    resumed = [f"{each['label']} ({named(each['resumed'])})" for each in group if each["resumed"]]
    if len(commits) > 1:
        sentences.append(
            f"Runs of {len(commits)} commits of this library; `commits` in the JSON file has those of each row."
        )
    if resumed:
        sentences.append(f"Resumed runs, whose memory is that of their last process: {'; '.join(resumed)}.")
    return sentences


def _machines(group: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sentences about a table whose runs or speeds are of several machines."""
    group, sentences = [*group], []
    trained = sorted({name for each in group for name in each["machines"]})
    measured = sorted({each["speed_machine"] for each in group} - {None})
    if len(trained) > 1:
        sentences.append(
            f"Runs of several machines, whose seconds a step are not to be compared: {'; '.join(trained)}."
        )
    if len(measured) > 1:
        sentences.append(
            f"Speeds of several machines; compare the ratios, not examples a second: {'; '.join(measured)}."
        )
    return sentences


def _cells(each: Mapping[str, Any]) -> list[str]:
    speed = ["", ""]
    if each["throughput_ratio"]:
        speed = [
            f"{each['throughput_ratio']:.2f} x ({each['examples_per_second']:.0f}/s)",
            f"{each['latency_ratio']:.2f} x ({1e3 * each['latency_seconds']:.1f} ms)",
        ]
    return [
        each["label"],
        _shown(each["mean"], each["interval"], ".1f"),
        _shown(each["gap"], each["gap_interval"], "+.1f") if each["method"] != "lora" else "",
        _shown(each["choice"], None, ".1f"),
        _shown(each["choice_gap"], None, "+.1f") if each["method"] != "lora" else "",
        f"{each['trainable_fraction_with_head']:.2%}",
        f"{each['weight_sparsity']:.0%}",
        f"{each['flops_per_example'] / 1e9:.2f} G ({each['flops_ratio']:.0%})",
        f"{each['model_bytes'] / 1e6:.1f} MB",
        *speed,
        f"{each['accelerator_memory_max'] / 1e9:.2f} GB",
        f"{each['seconds_per_step']:.3f} s",
    ]


def _shown(mean: float | None, interval: float | None, form: str) -> str:
    """Return a mean and the half width of its interval."""
    if mean is None:
        return ""
    return f"{mean:{form}}" + ("" if interval is None else f" ± {interval:.1f}")


NOTE = (
    "Each table has the rows of the seeds above it, and means over all of them. Test half: the score on the half of the dev "
    "set that took no part in the choice of a step. Validation half: the score on the half that chose the step; recipes are "
    "chosen by it, and ablations, below the methods, are in its order. ± is the half width of the 95 % interval of the mean "
    "over the seeds, by Student's t with n - 1 degrees of freedom. Differences from LoRA are of equal seeds: a row of one "
    "seed is compared with LoRA of that seed. Forgetting, the rise of the loss on a held text as PEFT defines it, is of "
    "decoders alone; the records of these encoders have null. Trained: share of all parameters, head "
    "included. FLOPs: of an example of the length above the table, which is the task's mean, or where no speed is measured "
    "``data.max_length``; zeros skipped and updates as factors (share of the pretrained model's). Saved: model and "
    "adapter. Throughput (32 examples) and latency (one example): of the finished model in turns with the pretrained one, "
    "whose figure is 1; zeros among the weights are multiplied like any other number. Memory: peak of the process of "
    "training. Step: seconds of training, nothing compiling."
)
"""The note below the tables."""
