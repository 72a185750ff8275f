"""Tiny complete runs: a random checkpoint, a few examples, every stage in seconds."""

import contextlib
import csv
import io
import json
import pathlib

import numpy as np

import tiny
from dsee_jax import config as configs
from dsee_jax import tree
from dsee_jax.ckpt import hf
from dsee_jax.train import config_file, loop
from dsee_jax.train.trackers import Tracker

NOT_COMPARED = ("train_seconds", "train_tokens_per_second", "peak_memory_bytes")
"""Figures of metrics.json that differ between equal runs."""

COSTS = {
    "trainable_parameters": 10,
    "trainable_fraction": 0.1,
    "head_parameters": 2,
    "weight_sparsity": 0.5,
    "flops_per_token": {"dense": 100, "final": 60},
    "flops_ratio": 0.6,
    "flops_per_example": {"length": 8, "dense": 900, "final": 500},
}
"""The costs in a metrics.json, made up."""


def table(folder: pathlib.Path, *, rows: int = 40, words: tuple[int, ...] = (5,), regression: bool = False) -> str:
    """Write train.csv and dev.csv (columns text and label) and return the folder; sentences of one length compile once."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", rows), ("dev", 20)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for number in range(count):
                text = generator.choice(tiny.WORDS, words[number % len(words)])
                score = int(np.sum(np.isin(text, tiny.WORDS[:8])))
                writer.writerow([" ".join(text), score if regression else ("no", "yes")[score % 2]])
    return str(folder)


def settings(folder: pathlib.Path, *, family: str = "bert", layers: int = 1, **overrides) -> dict[str, object]:
    """The keys of a DSEE run on a tiny checkpoint; creates the checkpoint and the data in ``folder`` if they do not exist.

    Overrides have two underscores for a dot: ``train__seed=1``.
    """
    if not (folder / "base").exists():
        tiny.bert(folder / "base", num_hidden_layers=layers, head=False, model_type=family)
        table(folder / "data")
    keys = {
        "model.path": str(folder / "base"),
        "data.source": "csv",
        "data.task": "tiny",
        "data.dir": str(folder / "data"),
        "data.text": "text",
        "data.max_length": 16,
        "delta.rank": 2,
        "delta.nonzeros": 5,
        "delta.support": "magnitude",
        "train.epochs": 2,
        "train.retune_epochs": 2,
        "train.batch_size": 8,
        "train.learning_rate": 1e-2,
        "output_dir": str(folder / "run"),
    }
    return keys | {key.replace("__", "."): value for key, value in overrides.items()}


def prompts(folder: pathlib.Path, *, rows: int = 24) -> str:
    """Write train.jsonl and dev.jsonl, prompts of three words with completions, and return the folder.

    A completion has the words of its prompt in reverse order; each prompt of the dev set has two references.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, count in (("train", rows), ("dev", 6)):
        lines = []
        for _ in range(count):
            words = generator.choice(tiny.WORDS[:6], 3).tolist()
            completions = [" ".join(words[::-1]), words[-1]][: 1 + (name == "dev")]
            lines += [{"prompt": " ".join(words), "completion": completion} for completion in completions]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(folder)


def causal_lm(folder: pathlib.Path, **overrides) -> dict[str, object]:
    """The overrides of `settings` for a causal-lm run on the decoder at ``folder / "base"``; writes the data."""
    keys = {
        "model__task": "causal-lm",
        "data__source": "jsonl",
        "data__dir": prompts(folder / "prompts"),
        "generate__new_tokens": 6,
        "generate__batch_size": 4,
    }
    return keys | overrides


def arguments(folder: pathlib.Path, **overrides) -> list[str]:
    """The `settings` as command-line overrides."""
    return [f"--{key}={json.dumps(value)}" for key, value in settings(folder, **overrides).items()]


def config(folder: pathlib.Path, **overrides) -> configs.Config:
    """The `settings` as a checked config."""
    return config_file.read(None, arguments(folder, **overrides))


def run(folder: pathlib.Path, **overrides) -> tuple[dict, pathlib.Path]:
    """Run every stage; return the results and the run's folder."""
    chosen = config(folder, **overrides)
    return loop.run(chosen, say=lambda text: None), folder / chosen.output_dir


def zeros(run: pathlib.Path, masks: dict) -> dict[str, np.ndarray]:
    """The pruned entries of the exported kernels, by path."""
    _, params = hf.load_pretrained(run / "model")
    flat = tree.flatten(params)
    return {path: np.asarray(flat[path])[~mask] for path, mask in tree.flatten(masks).items()}


def figures(run: pathlib.Path) -> dict:
    """The content of metrics.json without times and memory."""
    return {k: v for k, v in json.loads((run / "metrics.json").read_text()).items() if k not in NOT_COMPARED}


FINISHED: dict[str, dict[str, object]] = {
    "dsee": {},
    "structured": {
        "prune__kind": "structured",
        "prune__heads": 1,
        "prune__neurons": 0.4,
        "delta__targets": ["encoder/.*/kernel"],
    },
    "lora": {"prune__kind": "none", "delta__nonzeros": 0, "delta__alpha": 7, "train__epochs": 1},
}
"""The runs that a test session creates once, by kind; see the fixture ``finished_run``."""


def finish(folder: pathlib.Path, kind: str) -> None:
    """Create a run of `FINISHED` in ``folder / "run"``, with its checkpoint in ``folder / "base"``.

    ``tracked_figures.json`` has the calls of its tracker: ``[figures, step]`` each, and ``["finished", True]``; ``said.json``
    the lines for a person, without the tables.
    """
    calls: list[tuple] = []
    tracker = Tracker(
        lambda figures, step: calls.append((figures, step)), lambda well: calls.append(("finished", well))
    )
    said: list[object] = []
    with contextlib.redirect_stderr(io.StringIO()):  # no terminal
        loop.run(config(folder, **FINISHED[kind]), say=said.append, tracked=[tracker])
    (folder / "said.json").write_text(json.dumps([line for line in said if isinstance(line, str)]))
    (folder / "tracked_figures.json").write_text(json.dumps(calls))
