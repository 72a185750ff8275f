"""The token ids, loss weights, batches and learning rates of a run of prompts, in one file for another library.

``python -m benchmarks.decoder_tokens CONFIG OUT.npz [--section.key=value ...]`` writes all that `benchmarks.peft_decoder`
reads, so that both libraries train on equal batches in equal order and score equal tokens. The arrays of each set, with the
prefix ``train``, ``choose``, ``score`` or ``held``:

- ``ids``, ``segments``, ``labels`` (batches, rows, length) int32 and ``weights`` (batches, rows, length) float32, as in
  `dsee_jax.data.batches`; ``segments`` is the attention mask: 0 = padding, and the numbers of the texts of a packed row.
- ``lengths`` (batches,): the length to which the library pads each batch; the arrays have the longest.

``rates`` (steps,) is the schedule for a peak of 1. ``about`` is JSON: the Hugging Face folder of the model, the steps with an
evaluation, prompts (ids) and references of the generated texts, ids of the end and of padding, and parts of the config.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.runs import ROOT
from dsee_jax.ckpt import hf
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import Config
from dsee_jax.data import HELD
from dsee_jax.data.batches import Batches, eval_batches
from dsee_jax.errors import InputError
from dsee_jax.runtime import atomic
from dsee_jax.train import config_file, inputs, optim, stages

NAMES = {"ids": "input_ids", "segments": "attention_mask", "labels": "labels", "weights": "weights"}


def arrays(prefix: str, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the arrays of a set, padded to its longest batch."""
    every = list(batches)
    lengths = [batch["input_ids"].shape[1] for batch in every]
    made = {
        f"{prefix}_{short}": np.stack(
            [
                np.pad(batch[name], ((0, 0), (0, max(lengths) - length)))
                for batch, length in zip(every, lengths, strict=True)
            ]
        )
        for short, name in NAMES.items()
    }
    return made | {f"{prefix}_lengths": np.array(lengths)}


def contents(config: Config) -> dict[str, np.ndarray]:
    """Return the arrays of a run that tunes without pruning."""
    folder, task, train = resolve(config.model.path), inputs.read_task(config), config.train
    model, _ = hf.load_pretrained(folder, "causal-lm")
    data = inputs.read_data(config, task, folder, model)
    assert data.references is not None, "generate.new_tokens is 0"
    source = Batches(data.train, train.batch_size, epochs=1, seed=train.seed, edges=data.edges)
    epochs = stages.passes(config, source.steps_per_epoch)["tune"]
    source = Batches(data.train, train.batch_size, epochs=epochs, seed=train.seed, edges=data.edges)
    total = len(source)
    rate = optim.schedule(1.0, total, train.warmup)
    sets = {"choose": data.dev["dev"], "score": data.scoring["dev"], "held": data.dev[HELD]}
    about: dict[str, Any] = {
        "model": str(folder),
        "evaluations": stages.evaluations(train.eval_every, total, source.steps_per_epoch),
        "prompts": data.references.prompts,
        "references": data.references.texts,
        "ends": list(data.references.ends),
        "pad": data.references.pad,
        "batch_size": config.generate.batch_size,
        "new_tokens": config.generate.new_tokens,
        "clip": train.clip,
        "weight_decay": train.weight_decay,
    }
    return {
        **arrays("train", (source[step] for step in range(total))),
        **{
            key: value
            for name, tokens in sets.items()
            for key, value in arrays(
                name, (batch for batch, _ in eval_batches(tokens, train.batch_size, data.edges))
            ).items()
        },
        "rates": np.array([rate(step) for step in range(total)], np.float32),
        "about": np.array(json.dumps(about)),
    }


def main(arguments: list[str]) -> None:
    config, out, *overrides = arguments
    try:
        values = contents(config_file.read(ROOT / config, overrides))
    except InputError as error:
        sys.exit(str(error))
    with atomic.file(Path(out)) as staging, staging.open("wb") as file:
        np.savez_compressed(file, **values)


if __name__ == "__main__":
    main(sys.argv[1:])
