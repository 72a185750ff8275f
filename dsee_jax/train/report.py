"""What a person reads: progress bars, lines of metrics, the table at the end of a run."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from dsee_jax.runtime.console import size
from dsee_jax.runtime.storage import Place

NAMES = {
    "before": "pretrained, new head",
    "draw": "the ticket, not tuned",
    "tune": "after tuning",
    "prune": "after pruning",
    "retune": "after re-tuning",
}


def tables(results: dict[str, Any]) -> list[Table]:
    """Return the scores by stage, and what the model costs, of the content of ``metrics.json``."""
    rows = [{"name": "before", "metrics": results["before"]}, *results["stages"]]
    names = list(results["final"])
    scores = Table(title=f"{results['task']}, seed {results['seed']}: scores on the dev set", title_justify="left")
    scores.add_column("stage")
    for name in names:
        scores.add_column(name, justify="right")
    for row in rows:
        name = "pretrained" if row["name"] == "before" and not results["head_parameters"] else row["name"]
        scores.add_row(NAMES.get(name, name), *(f"{row['metrics'][key]:.4f}" for key in names))
    costs = Table(title="what it costs", title_justify="left", show_header=False)
    flops = results["flops_per_token"]
    for name, value in (
        ("trained of the backbone", f"{results['trainable_parameters']:,} = {results['trainable_fraction']:.2%}"),
        ("trained in the head", f"{results['head_parameters']:,}"),
        ("weights zero or cut out", f"{results['weight_sparsity']:.1%} of the prunable kernels"),
        ("FLOPs a token, dense", f"{flops['dense']:,}"),
        ("FLOPs a token, zeros skipped", f"{flops['final']:,} = {results['flops_ratio']:.1%}"),
        ("bytes of model and adapter", size(results["model_bytes"])),
        ("seconds of training", f"{results['train_seconds']:.0f}"),
        ("tokens a second", f"{results['train_tokens_per_second']:,.0f}"),
        ("peak memory", size(results["peak_memory_bytes"])),
    ):
        costs.add_row(name, value)
    return [scores, costs]


def final(results: dict[str, Any], out: Place, say: Callable[[Any], None]) -> None:
    """Say the tables of a finished run and where its files are."""
    for table in tables(results):
        say(table)
    say(f"model    {out / 'model'}    (Hugging Face layout, pruned weights)")
    if (out / "adapter").exists():
        say(f"adapter  {out / 'adapter'}    (low-rank + sparse updates, head, masks)")
    say(f"figures  {out / 'metrics.json'}, {out / 'metrics.jsonl'}")
    say(f"next     python -m dsee_jax evaluate {out}; python -m dsee_jax export {out} OUT --format hf")
