"""The speed of a finished run of a decoder: seconds of a training step, and tokens written per second.

``python -m benchmarks.decoder_speed RUN_DIR --steps 8 --prompts 16`` prints both as JSON, and the digest of the batches and
prompts (`benchmarks.timed_steps`). The step is that of the last stage of the run, of the smaller model after a cut; its
batches are the first of the run. Texts are written by the finished model, updates folded in, for the first prompts in one
batch: `generate.new_tokens` for each; no token ends a text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import timed_steps
from benchmarks.decoder_tokens import NAMES
from dsee_jax.ckpt import kept_units
from dsee_jax.ckpt.folders import CONFIG, MODEL
from dsee_jax.data.batches import Batch
from dsee_jax.generation import decoding, texts
from dsee_jax.runtime import malloc
from dsee_jax.train import config_file, finished_run, programs, pruning, setup, sharding, stages, step


def first_batches(made: setup.Setup, steps: int) -> list[Batch]:
    """Return the batches of the timed steps; all stages of a run together read what the one stage of a peer reads."""
    passes = stages.passes(made.config, stages.batches(made, 1.0).steps_per_epoch)
    source = stages.batches(made, sum(passes.values()))
    return [source[number] for number in timed_steps.numbers(steps, len(source))]


def step_seconds(made: setup.Setup, batches: list[Batch]) -> float:
    """Return the median seconds of a step of the model of a setup on ``batches``."""
    compiled, trained = programs.make_programs(made), sharding.place(made.placed, made.trained)
    state = step.State(jax.numpy.zeros((), jax.numpy.int32), trained, compiled.optimizer.init(trained))
    # Placed as in a run: a state placed otherwise than the state that a step returns would compile the step twice.
    state = sharding.place(made.placed, state)
    frozen: Any = sharding.place(made.placed, pruning.freeze(made, {}))
    key, rate = jax.random.key(0), np.float32(made.config.train.learning_rate)

    def once(batch: Any) -> None:
        nonlocal state
        state, loss = compiled.step(state, frozen, batch, key, rate, None)
        jax.block_until_ready((state, loss))

    ready = jax.block_until_ready([sharding.split(made.placed.mesh, batch) for batch in batches])
    return timed_steps.median_seconds(once, ready, [batch["input_ids"].shape[1] for batch in batches])


def written_per_second(run: Path, prompts: list[list[int]], pad: int, count: int) -> float:
    """Return the tokens per second that the finished model of a run writes for ``prompts`` in one batch."""
    finished = finished_run.load(run)
    params = jax.device_put(finished_run.plain_params(finished))
    ids, mask = decoding.pad_left(prompts, pad=pad, multiple=texts.MULTIPLE)

    def write() -> None:
        # No token ends a text: all models write equally many.
        jax.block_until_ready(decoding.generate(finished.model, params, ids, mask, new_tokens=count, pad=pad))

    return timed_steps.tokens_per_second(write, len(prompts) * count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    malloc.keep_freed_memory()
    config = config_file.read(options.run / CONFIG)
    made = setup.prepare(config)
    kept = kept_units.read(options.run / MODEL)
    references = made.data.references
    assert references is not None, "generate.new_tokens is 0"
    batches, prompts = first_batches(made, options.steps), references.prompts[: options.prompts]
    named = [{short: batch[name] for short, name in NAMES.items()} for batch in batches]
    figures = {
        "seconds_per_step": step_seconds(pruning.resize(made, kept) if kept else made, batches),
        "digest": timed_steps.digest(named, prompts),
    }
    del made
    written = written_per_second(options.run, prompts, references.pad, config.generate.new_tokens)
    print(json.dumps(figures | {"written_tokens_per_second": written}))


if __name__ == "__main__":
    main()
