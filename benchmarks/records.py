"""The record of a run in the schema of PEFT's method comparison, and statistics over the records of several seeds.

PEFT's comparison (``method_comparison`` of its repository) keeps one JSON file per experiment: ``run_info`` says how it was
run, ``train_info`` what it cost and scored, ``meta_info`` on which versions and machine. PEFT's ``processing.py`` reads these
records: the keys that it takes of the task MetaMathQA are there. Differences from PEFT's files:

- null are ``peft_branch`` and the versions of packages that the run does not load (PEFT, datasets, PyTorch, bitsandbytes);
  ``peft_worktree_is_dirty`` and the commits of packages are absent, but for the commit of this library.
- ``train_config`` is the config of this library, in sections, with ``model_id``: the name of the pretrained model, which is no
  id of the Hugging Face hub. ``peft_type`` may be DSEE.
- ``run_info`` has the name of the machine too, and ``resumed``: whether an earlier process began the run. ``total_time`` and
  memory are of the last process, and so understate the cost of a resumed run; ``train_time`` is of all processes.
  ``resumed`` is null where it is not known.
- ``meta_info`` has the SHA-256 of the model and of the examples of each split.
- ``accelerator_memory_max`` is the peak of the device where it counts its memory, and else that of the process, which holds
  Python, JAX and compiling too; ``accelerator`` says which device. Memory is not sampled:
  ``accelerator_memory_reserved_avg`` and ``accelerator_memory_reserved_99th`` repeat the peak.
- ``valid SCORE`` is on the validation half of the dev set, which chooses the best step, ``test SCORE`` on the test half. The
  last entry of ``metrics`` has both, of the chosen step; ``valid`` is for choosing between recipes.
- ``test accuracy`` of a decoder is the share of its greedy texts that equal a reference; it is null for a task of regression.
- ``forgetting``, the rise of the loss on a held text as PEFT defines it, is of decoders alone. It is null for an encoder,
  which predicts no text.
- ``file_size`` is of the files that the method adds to the pretrained model: the adapter, or where it changes the weights of
  the model the model with the adapter.
- ``inference_info`` is added: the speed of the finished model next to the pretrained one (`benchmarks.inference`), or
  that of the methods measured in turns (`benchmarks.decoders`).
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import scipy.stats

from benchmarks import machine
from benchmarks.runs import ROOT

PACKAGES = ("dsee_jax", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "tokenizers")
NOT_LOADED = ("peft", "datasets", "torch", "bitsandbytes")
"""Packages whose versions PEFT's records have."""


def of_run(run: Path, config: Mapping[str, Any], **about: Any) -> dict[str, Any]:
    """Return the record of a finished run.

    Args:
      run: its folder.
      config: its settings, without places (`runs.settings`).
      **about: ``experiment_name``, ``model``, ``task``, ``method``, ``score`` (the name of the metric), ``seed``,
        ``total_time`` (seconds of its last process) and ``resumed`` (`experiments.labels`).
    """
    figures, hashes = (json.loads((run / name).read_text()) for name in ("metrics.json", "hashes.json"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    delta = dict(config["delta"])
    plain = not (delta["rank"] or delta["nonzeros"])
    kind = "LORA" if not delta["nonzeros"] and config["prune"]["kind"] == "none" else "DSEE"
    return {
        "run_info": _run_info(config, about, None if plain else {"peft_type": kind, **delta}, config["prune"]),
        "train_info": _training(run, figures, lines, about["score"], config["train"]["batch_size"]),
        "meta_info": {
            "model_info": {"sha256": hashes["base"]},
            "dataset_info": {about["task"]: {"sha256": hashes["data"]}},
            "package_info": _packages(),
            "system_info": _system(figures["environment"]["device"]),
        },
    }


def of_peer(
    figures: Mapping[str, Any], scores: Mapping[str, float], config: Mapping[str, Any], **about: Any
) -> dict[str, Any]:
    """Return the record of a decoder's run by PEFT.

    Args:
      figures: of `benchmarks.peft_decoder`.
      scores: of its texts.
      config: the settings that the run shares with one of this library.
      **about: as for `of_run`.
    """
    speed, final, before = statistics.median(figures["seconds"]), figures["final"], figures["before"]
    total, batch, held = len(figures["losses"]), config["train"]["batch_size"], final["held"]
    return {
        "run_info": _run_info(config, about, figures["config"], None),
        "train_info": {
            **_memory(figures["peak_memory_bytes"]),
            "accelerator": "cpu",
            "train_time": sum(figures["seconds"]),
            "seconds_per_step": speed,
            "file_size": figures["file_size"],
            "num_trainable_params": figures["trained_parameters"],
            "num_total_params": figures["total_parameters"],
            "status": "success",
            "trainable_fraction_with_head": figures["trained_parameters"] / figures["total_parameters"],
            "weight_sparsity": 0.0,
            "flops_ratio": None,
            "before": {"loss": before["score"], "loss_held": before["held"]},
            "metrics": [
                *(
                    {
                        "step": each["step"],
                        "valid loss": each["loss"],
                        "train loss": figures["losses"][each["step"] - 1],
                    }
                    for each in figures["evaluations"]
                ),
                {
                    "step": total,
                    **_losses("valid", figures["choose"]),
                    **_losses("test", final["score"]),
                    **{f"test {name}": value for name, value in scores.items()},
                    "test accuracy": scores.get("exact_match"),
                    "test loss_held": held,
                    "train loss": figures["losses"][-1],
                    "train samples": total * batch,
                    "train total tokens": figures["tokens"],
                    "forgetting": held - before["held"],
                },
            ],
        },
        "meta_info": {
            "package_info": _packages() | {f"{name}-version": version for name, version in figures["packages"].items()},
            "system_info": _system("cpu"),
        },
    }


def _run_info(
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    peft_config: Mapping[str, Any] | None,
    prune_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    train_config = {name: config[name] for name in config if name not in ("delta", "prune")}
    return {
        **origin(),
        **about,
        "peft_branch": None,
        "train_config": {"model_id": about["model"], **train_config},
        "peft_config": peft_config,
        "prune_config": prune_config,
        "error_msg": "",
    }


def _memory(peak: int) -> dict[str, int]:
    """Return the peak under the three names of PEFT, whose reader takes no null for any of them."""
    return {f"accelerator_memory_{name}": peak for name in ("max", "reserved_avg", "reserved_99th")}


def _losses(half: str, loss: float) -> dict[str, float]:
    return {f"{half} loss": loss, f"{half} perplexity": math.exp(loss)}


def origin() -> dict[str, str]:
    """Return the time, ``created_at``, and the name of this machine."""
    return {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.name(),
    }


def _system(accelerator: str) -> dict[str, Any]:
    named = ("system", "release", "version", "machine", "processor")
    return {
        **{name: getattr(platform, name)() for name in named},
        "accelerator": accelerator,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        f"{name}-version": importlib.metadata.version(name.replace("_", "-")) for name in PACKAGES
    }
    versions |= {f"{name}-version": None for name in NOT_LOADED}
    # An installed package has no history.
    shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return versions | {"dsee_jax-commit-hash": shown.stdout.strip() or None}


def _training(
    run: Path, figures: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], score: str, batch: int
) -> dict[str, Any]:
    # The figures of a search are those of the stage that ends it.
    names = {"draw": "search"}
    stages: list[dict[str, Any]] = [stage for stage in figures["stages"] if "steps" in stage]
    steps = {str(names.get(stage["name"], stage["name"])): stage["steps"] for stage in stages}
    total, seconds = sum(steps.values()), figures["train_seconds"]
    tokens = figures["train_tokens_per_second"] * seconds
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    final, losses = figures["final"], [line["loss"] for line in lines if "loss" in line]
    changed = figures["weight_sparsity"] or not figures["trainable_parameters"] or not (run / "adapter").exists()
    added = figures["model_bytes"] if changed else (run / "adapter" / "adapter.safetensors").stat().st_size
    return {
        **_memory(figures["peak_memory_bytes"]),
        "accelerator": figures["environment"]["device"],
        "train_time": seconds,
        # Of the log lines in the middle: the first waits for the compiler.
        "seconds_per_step": tokens / total / statistics.median(speeds),
        "file_size": added,
        "model_bytes": figures["model_bytes"],
        "num_trainable_params": figures["trainable_parameters"] + figures["head_parameters"],
        "num_total_params": figures["backbone_parameters"] + figures["head_parameters"],
        "status": "success",
        **{
            name: figures[name]
            for name in (
                *("trainable_fraction", "trainable_fraction_with_head", "weight_sparsity", "kept"),
                *("flops_ratio", "flops_per_token", "flops_per_example"),
            )
        },
        **{name: figures[name] for name in ("before", "dev_examples") if name in figures},
        "metrics": [
            *_evaluations(lines, steps, score, batch),
            {
                "step": total,
                **{f"valid {name}": value for name, value in figures["choose"].items()},
                **{f"test {name}": value for name, value in ({"accuracy": final.get("exact_match")} | final).items()},
                "train loss": losses[-1],
                "train samples": total * batch,
                "train total tokens": round(tokens),
                "forgetting": figures.get("forgetting"),
            },
        ],
    }


def _evaluations(
    lines: Sequence[Mapping[str, Any]], steps: Mapping[str, int], score: str, batch: int
) -> list[dict[str, Any]]:
    """Return the evaluations while a stage trained; their steps count over all stages."""
    done, before, speeds, loss = [], 0, [], math.nan
    stage = ""
    for line in lines:
        if line["stage"] in steps and line["stage"] != stage:
            before += steps.get(stage, 0)
            stage = line["stage"]
        if "loss" in line:
            loss = line["loss"]
            speeds.append(line["tokens_per_second"])
        elif "metrics" in line and line["stage"] in steps and speeds:
            step = before + line["step"]
            valid = {f"valid {score}": line["metrics"][score], "valid loss": line["metrics"].get("loss")}
            speed = statistics.median(speeds)
            done.append(
                {"step": step, **valid, "train loss": loss, "train samples": step * batch, "tokens / sec": speed}
            )
            speeds = []
    return done


def score(record: Mapping[str, Any], half: Literal["valid", "test"]) -> float:
    """Return the score of the chosen step of a record on a half of the dev set, times 100."""
    return 100 * record["train_info"]["metrics"][-1][f"{half} {record['run_info']['score']}"]


def interval(values: Sequence[float]) -> float | None:
    """Return the half width of the 95 % interval of the mean, by Student's t with n - 1 degrees; None for one value."""
    if len(values) < 2:
        return None
    width = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(width * statistics.stdev(values) / math.sqrt(len(values)))


def flops(record: Mapping[str, Any], length: float) -> dict[str, float]:
    """Return the FLOPs of an example of ``length`` tokens, ``{"dense", "final"}``: those of attention grow with its square."""
    per_token, example = (record["train_info"][name] for name in ("flops_per_token", "flops_per_example"))
    known = example["length"]
    attention = {name: example[name] / known - per_token[name] for name in per_token}
    return {name: length * (per_token[name] + attention[name] * length / known) for name in per_token}
