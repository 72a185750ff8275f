"""Tables of methods: one row for the records of all seeds (`benchmarks.records`), with intervals and differences."""

from collections.abc import Iterable, Mapping
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
        "machines": sorted({record["run_info"]["machine"] for record in kept.values()}),
        "speed_machine": f"{speed['machine']}, {speed['device']}" if speed else None,
        **measured,
    }


def compared(rows: Iterable[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Return the rows with mean and interval, and with the difference from the method ``baseline``, over equal seeds.

    ``choice`` is the mean on the validation half of the dev set, over the seeds that all rows of a model and task have; None
    where they have none in common.
    """
    rows = list(rows)
    shared: dict[tuple[str, str], set[int]] = {}
    for each in rows:
        seeds = {*each["choices"]}
        shared[each["model"], each["task"]] = shared.get((each["model"], each["task"]), seeds) & seeds
    base = {(each["model"], each["task"]): each["scores"] for each in rows if each["method"] == baseline}
    done = []
    for each in rows:
        scores, other = each["scores"], base.get((each["model"], each["task"]), {})
        values, gaps = [*scores.values()], [scores[seed] - other[seed] for seed in scores if seed in other]
        choices = [each["choices"][seed] for seed in sorted(shared[each["model"], each["task"]])]
        done.append(
            {
                **each,
                "mean": float(np.mean(values)),
                "interval": records.interval(values),
                "choice": float(np.mean(choices)) if choices else None,
                "gap": float(np.mean(gaps)) if gaps else None,
                "gap_interval": records.interval(gaps),
            }
        )
    return done


HEADS = (
    *("method", "score", "against LoRA", "validation half", "trained", "zeros"),
    *("FLOPs", "saved", "throughput", "latency", "memory", "step"),
)
"""The columns of the tables in Markdown."""


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the tables in Markdown, one for each model and task."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for each in rows:
        groups.setdefault((each["model"], each["task"]), []).append(each)
    text = []
    for group in groups.values():
        count, length = max(len(each["scores"]) for each in group), round(group[0]["length"])
        text += [
            f"**{group[0]['title']}**: {group[0]['score']} x 100, {count} seed{'s' * (count > 1)}, FLOPs of {length} tokens",
            "",
            *runs.table(HEADS, map(_cells, group)),
            *_machines(group),
        ]
    return "\n".join([*text, NOTE]) + "\n"


def _machines(group: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the lines about a table whose runs or speeds are of several machines, and an empty line; [] for one machine."""
    group, lines = [*group], []
    trained = sorted({name for each in group for name in each["machines"]})
    measured = sorted({each["speed_machine"] for each in group} - {None})
    if len(trained) > 1:
        lines.append(f"Runs of several machines, whose seconds a step are not to be compared: {'; '.join(trained)}.")
    if len(measured) > 1:
        lines.append(f"Speeds of several machines; compare the ratios, not examples a second: {'; '.join(measured)}.")
    return [*lines, *([""] if lines else [])]


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
    "Scores are of the test half of the dev set, which took no part in the choice of a step. ± is the half width of the 95 "
    "% interval of the mean over the seeds, by Student's t with n - 1 degrees of freedom; differences from LoRA are of "
    "equal seeds. Validation half: the score on the half that chose the step, over the seeds that all rows have; recipes "
    "are chosen by it, and ablations, below the methods, are in its order. Trained: share of all parameters, head "
    "included. FLOPs: of an example of the length above the table, which is the task's mean, or where no speed is measured "
    "``data.max_length``; zeros skipped and updates as factors (share of the pretrained model's). Saved: model and "
    "adapter. Throughput (32 examples) and latency (one example): of the finished model in turns with the pretrained one, "
    "whose figure is 1; zeros among the weights are multiplied like any other number. Memory: peak of the process of "
    "training. Step: seconds of training, nothing compiling."
)
"""The note below the tables."""
