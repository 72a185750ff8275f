"""The model card of a run, beside its model and its exports: scores (the hub's ``model-index``), costs, settings, use."""

from pathlib import Path
from typing import Any

import yaml

from dsee_jax.ckpt import card
from dsee_jax.config import Config, model_task
from dsee_jax.runtime import console
from dsee_jax.train import config_file, report

_PLACES = ("model.path", "data.dir", "data.held_text", "delta.start", "output_dir", "train.trackers")
"""The settings that a card does not show: places of one machine, and trackers."""

_TASKS = {"sequence-classification": "text-classification", "causal-lm": "text-generation"}
"""The hub's names of the tasks, where they differ."""

_METRICS = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "rouge_l": "rouge",
    "f1_micro": "f1",
    "f1_macro": "f1",
    "subset_accuracy": "accuracy",
}
"""The hub's names of the metrics, where they differ."""

_OWN = 'import dsee_jax\n\nmodel, params = dsee_jax.load_pretrained("FOLDER", task="{task}"{labels})\n'

_OPENS = {
    "model": _OWN,
    "compact": _OWN,
    "pipeline": 'from transformers import pipeline\n\nrun = pipeline("{hub}", model="FOLDER")\n',
    "hf": 'from transformers import AutoModelFor{cls}\n\nmodel = AutoModelFor{cls}.from_pretrained("FOLDER")\n',
    "peft": 'from peft import AutoPeftModelFor{cls}\n\nmodel = AutoPeftModelFor{cls}.from_pretrained("FOLDER"{labels})\n',
    "stablehlo": "# python run.py '[[101, 7592, 102]]' prints the logits of these tokens\n",
}
"""How each form of a model is opened first; a pipeline opens an ``hf`` one, but transformers 5 has none for questions."""

_ABOUT = {
    "model": "The pruned weights and the tuned head. The updates are separate, in `adapter/`; the scores are those "
    "of both together.",
    "compact": "A compact checkpoint, without the pruned units, for dsee_jax.",
    "hf": "The updates are folded into the weights, so that the kernels with an update are dense.",
    "peft": "A PEFT adapter, for the base that `adapter_config.json` names.",
    "stablehlo": "A StableHLO program, with its weights, for any batch and length.",
}


_ELSEWHERE = (
    " That base is on the machine that made the adapter. To open it elsewhere, upload the base to the hub, and export the run "
    "again with `--base OWNER/NAME`."
)
"""About a PEFT adapter whose base has no hub id."""


def render(config: Config, results: dict[str, Any], *, name: str, classes: int, form: str, base: str = "") -> str:
    """Return the model card of a run.

    Args:
      config: of the run.
      results: the content of ``metrics.json``; the costs that are measured may be absent.
      name: of the model.
      classes: the number of its outputs; not used for causal-lm.
      form: ``model`` for weights apart from their ``adapter/``, as those of the run, or the format of an export.
      base: the base that a PEFT adapter names.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task, source = model_task(config), config.data.source
    hub = _TASKS.get(task, task)
    scores = {key: value for key, value in results["final"].items() if value is not None}
    data = ModelCardData(
        base_model=card.hub_ids([base]) or card.hub_ids([config.model.path]),
        library_name={"hf": "transformers", "peft": "peft"}.get(form, "dsee_jax"),
        pipeline_tag=hub,
        tags=["dsee", *(["pruned"] if config.prune.kind != "none" else [])],
        model_name=console.plain(name),
        eval_results=[
            EvalResult(
                task_type=hub,
                dataset_type=source if source in ("glue", "e2e") else console.plain(results["task"]),
                dataset_name=console.plain(results["task"]),
                dataset_config=config.data.task if source == "glue" else None,
                dataset_split="validation",
                metric_type=str(_METRICS.get(metric, metric)),
                metric_name=metric,
                metric_value=round(value, 6),
            )
            for metric, value in scores.items()
        ],
    )
    labels = "" if task == "causal-lm" else f", num_labels={classes}"
    opener = "pipeline" if form == "hf" and task != "question-answering" else form
    opens = _OPENS[opener].format(
        task=task, hub=hub, labels=labels, cls=task.title().replace("-", "").replace("Lm", "LM")
    )
    stages = [
        [report.NAMES.get(row["name"], row["name"]), *(_score(row["metrics"].get(key)) for key in scores)]
        for row in report.rows(results)
    ]
    defaults = config_file.flat(Config())
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config_file.flat(config).items()
        if value != defaults[key] and key not in _PLACES
    }
    chosen = "The dev set chooses the best evaluation of each stage, which is the one shown."
    if "choose" in results:
        chosen = (
            "The validation half chooses the best evaluation of each stage; the model that it chose is scored here."
        )
    shown = yaml.safe_dump(settings, sort_keys=False)
    return card.render(
        name,
        data,
        f"{card.code(_base(config.model.path))} tuned on {card.code(results['task'])} with "
        "[DSEE](https://arxiv.org/abs/2111.00160): low-rank and sparse updates, and pruning of the pretrained weights. "
        f"{_ABOUT[form]}{_ELSEWHERE if form == 'peft' and not card.hub_ids([base]) else ''}\n",
        f"## Scores on {report.scored_on(results)}\n",
        card.table(["stage", *map(card.prose, scores)], stages),
        f"\n{chosen}\n\n## Costs\n",
        card.table(["", ""], [[name, value] for name, value in report.costs(results)]),
        f"\n## Use\n\n{card.block(opens, 'bash' if form == 'stablehlo' else 'python')}",
        f"## Settings\n\nThose that differ from the defaults of dsee_jax.\n\n{card.block(shown, 'yaml')}",
    )


def _base(path: str) -> str:
    """Return the name of a base: a hub id or a package as it is, of a folder its last part."""
    return path if card.hub_ids([path]) or path.startswith("package:") else Path(path).name


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
