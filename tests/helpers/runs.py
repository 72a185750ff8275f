"""Tiny whole runs: a random checkpoint, a handful of examples, every stage in seconds."""

import csv
import json
import pathlib

import numpy as np

import tiny
from dsee_jax import config as configs
from dsee_jax import tree
from dsee_jax.ckpt import hf
from dsee_jax.train import config_file, loop

NOT_COMPARED = ("train_seconds", "train_tokens_per_second", "peak_memory_bytes")
"""Figures of metrics.json that two equal runs do not share."""


def table(folder: pathlib.Path, *, rows: int = 40, words: tuple[int, ...] = (5,), regression: bool = False) -> str:
    """Write train.csv and dev.csv (columns text and label) and return the folder; one length of sentence compiles once."""
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


def settings(folder: pathlib.Path, *, family: str = "bert", **overrides) -> dict[str, object]:
    """The keys of a DSEE run on a tiny checkpoint; makes the checkpoint and the data in ``folder`` where they are not.

    A section's key is written with two underscores: ``train__seed=1``.
    """
    if not (folder / "base").exists():
        tiny.bert(folder / "base", num_hidden_layers=1, head=False, model_type=family)
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


def written(folder: pathlib.Path, *, rows: int = 24) -> str:
    """Write train.jsonl and dev.jsonl, prompts of three words and what follows them, and return the folder.

    The response says the prompt's words again, the last first; of the dev set's prompts each has two references.
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


def writing(folder: pathlib.Path, **overrides) -> dict[str, object]:
    """What makes `settings` those of a run of causal-lm on the decoder at ``folder / "base"``; makes the data."""
    keys = {
        "model__task": "causal-lm",
        "data__source": "jsonl",
        "data__dir": written(folder / "prompts"),
        "generate__new_tokens": 6,
        "generate__batch_size": 4,
    }
    return keys | overrides


def arguments(folder: pathlib.Path, **overrides) -> list[str]:
    """The same as the overrides of a command line."""
    return [f"--{key}={json.dumps(value)}" for key, value in settings(folder, **overrides).items()]


def config(folder: pathlib.Path, **overrides) -> configs.Config:
    """The same as a checked config."""
    return config_file.read(None, arguments(folder, **overrides))


def run(folder: pathlib.Path, **overrides) -> tuple[dict, pathlib.Path]:
    """Run every stage; return the results and the run's folder."""
    settled = config(folder, **overrides)
    return loop.run(settled, say=lambda text: None), folder / settled.output_dir


def zeros(run: pathlib.Path, masks: dict) -> dict[str, np.ndarray]:
    """The entries of the exported kernels that the masks cut, by path."""
    _, params = hf.load_pretrained(run / "model")
    flat = tree.flatten(params)
    return {path: np.asarray(flat[path])[~mask] for path, mask in tree.flatten(masks).items()}


def figures(run: pathlib.Path) -> dict:
    """What metrics.json holds, times and memory aside."""
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
"""The runs that a session makes once, by kind; see the fixture ``finished_run``."""


def finish(folder: pathlib.Path, kind: str) -> None:
    """Make a run of `FINISHED` in ``folder / "run"``, its checkpoint in ``folder / "base"``."""
    loop.run(config(folder, **FINISHED[kind]), say=lambda text: None)
