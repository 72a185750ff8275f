"""The tables at the end of a run: scores by stage, costs, and the paths of its files."""

import shlex
from collections.abc import Callable
from typing import Any

from rich.table import Table

from dsee_jax.ckpt.folders import ADAPTER, LOG, METRICS, MODEL
from dsee_jax.runtime import console
from dsee_jax.runtime.storage import Place

NAMES = {
    "before": "pretrained",
    "draw": "ticket, before tuning",
    "tune": "after tuning",
    "prune": "after pruning",
    "retune": "after re-tuning",
}


_MEASURED: dict[str, tuple[str, Callable[[float], str]]] = {
    "model_bytes": ("size of model and adapter", console.size),
    "train_seconds": ("training seconds", "{:.0f}".format),
    "train_tokens_per_second": ("tokens per second", "{:,.0f}".format),
    "peak_memory_bytes": ("peak memory", console.size),
}
"""The costs that are measured, by their keys in ``metrics.json``; the card of a run is written before them."""


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the tables of scores by stage and of costs, from the content of ``metrics.json``."""
    names = list(results["final"])
    title = f"{results['task']}, seed {results['seed']}: scores on {scored_on(results)}"
    scores = Table(title=title, title_justify="left")
    scores.add_column("stage")
    for name in names:
        scores.add_column(name, justify="right")
    for row in rows(results):
        count = row.get("evaluations", 1)
        choice = f", best of {count} evaluations" if count > 1 else ""
        scores.add_row(f"{NAMES.get(row['name'], row['name'])}{choice}", *_cells(row["metrics"], names))
        half = ", on the validation half" if "choose" in row else ""
        if count > 1 and half:
            scores.add_row(f"  the same{half}", *_cells(row["choose"], names))
        if count > 1:
            scores.add_row(f"  at its last step{half}", *_cells(row["last"], names))
    shown = Table(title="costs", title_justify="left", show_header=False)
    for name, value in costs(results):
        shown.add_row(name, value)
    return [scores, shown]


def scored_on(results: dict[str, Any]) -> str:
    """Return the examples that the scores of a run are of, in words."""
    if "choose" not in results:
        return "the dev set"
    count = next(iter(results["dev_examples"].values()))["score"]
    return f"the test half of the dev set ({count:,} examples)"


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stages of a run, the pretrained model first: ``{"name", "metrics"}``, and more where a stage trains."""
    return [{"name": "before", "metrics": results["before"]}, *results["stages"]]


def costs(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the costs of a run, each with its name; those that are measured only where ``results`` has them."""
    flops, example = results["flops_per_token"], results["flops_per_example"]
    # Runs of earlier versions lack some figures.
    both = results.get("trainable_fraction_with_head")
    share = "" if both is None else f"; head and backbone together {both:.2%} of all parameters"
    rank = f", rank {results['rank']}" if results.get("rank") else ""
    return [
        (
            "trained parameters, backbone",
            f"{results['trainable_parameters']:,} = {results['trainable_fraction']:.2%}{rank}",
        ),
        ("trained parameters, head", f"{results['head_parameters']:,}{share}"),
        ("weights zero or removed", f"{results['weight_sparsity']:.1%} of the prunable kernels"),
        *_of_cut(results),
        ("FLOPs per token, dense", f"{flops['dense']:,} without attention scores"),
        ("FLOPs per token, zeros skipped", f"{flops['final']:,} = {results['flops_ratio']:.1%}"),
        ("FLOPs per example, dense", f"{example['dense']:,} with attention scores, {example['length']} tokens"),
        ("FLOPs per example, zeros skipped", f"{example['final']:,} = {example['final'] / example['dense']:.1%}"),
        *((name, text(results[key])) for key, (name, text) in _MEASURED.items() if key in results),
    ]


def _of_cut(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the parameters that are left and the target of a cut, where ``results`` has them."""
    shown = []
    if (ratio := results.get("parameters_ratio")) is not None:
        shown.append(("parameters left, with updates", f"{ratio:.1%} of the backbone"))
    for target in (stage["target"] for stage in results.get("stages", ()) if "target" in stage):
        measured = f", measured {target['measured']:.1%}" if "measured" in target else ""
        shown.append(
            (f"target: {target['kind']}", f"{target['reached']:.1%}{measured}, at most {target['budget']:.1%}")
        )
    return shown


def _cells(metrics: dict[str, Any], names: list[str]) -> list[str]:
    return ["" if metrics.get(name) is None else f"{metrics[name]:.4f}" for name in names]


def show(results: dict[str, Any], out: Place, say: Callable[[Any], None]) -> None:
    """Pass the tables of a finished run and the paths of its files to ``say``."""
    for table in tables(results):  # both, before the first is shown
        say(table)
    say(f"model    {out / MODEL}    (Hugging Face layout, pruned weights)")
    if (out / ADAPTER).exists():
        say(f"adapter  {out / ADAPTER}    (low-rank + sparse updates, head, masks)")
    say(f"figures  {out / METRICS}, {out / LOG}")
    folder = shlex.quote(str(out))
    say(f"next     python -m dsee_jax evaluate {folder}; python -m dsee_jax export {folder} OUT --format hf")
