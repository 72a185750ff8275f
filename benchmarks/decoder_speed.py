"""The speed of a finished run of a decoder: seconds of a training step, and tokens written per second.

``python -m benchmarks.decoder_speed RUN_DIR --steps 8 --prompts 16`` prints both as JSON. The step is that of the last stage
of the run, of the smaller model after a cut. Texts are written by the finished model, updates folded in, for the first
prompts in one batch: `generate.new_tokens` for each; no token ends a text.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsee_jax.ckpt import kept_units
from dsee_jax.ckpt.folders import CONFIG, MODEL
from dsee_jax.generation import decoding, texts
from dsee_jax.runtime import malloc
from dsee_jax.train import config_file, finished_run, programs, pruning, setup, sharding, stages, step


def step_seconds(made: setup.Setup, steps: int) -> float:
    """Return the median seconds of ``steps`` steps of the model of a setup, after two that are not counted."""
    compiled, source = programs.make_programs(made), stages.batches(made, 1.0)
    trained = sharding.place(made.placed, made.trained)
    state = step.State(jax.numpy.zeros((), jax.numpy.int32), trained, compiled.optimizer.init(trained))
    frozen: Any = sharding.place(made.placed, pruning.freeze(made, {}))
    key, rate, seconds = jax.random.key(0), np.float32(made.config.train.learning_rate), []
    for number in range(steps + 2):
        batch = sharding.split(made.placed.mesh, source[number % len(source)])
        begin = time.perf_counter()
        state, loss = compiled.step(state, frozen, batch, key, rate, None)
        jax.block_until_ready((state, loss))
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[2:])


def written_per_second(run: Path, prompts: list[list[int]], pad: int, count: int) -> float:
    """Return the tokens per second that the finished model of a run writes for ``prompts`` in one batch."""
    finished = finished_run.load(run)
    params = jax.device_put(finished_run.plain_params(finished))
    ids, mask = decoding.pad_left(prompts, pad=pad, multiple=texts.MULTIPLE)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        # No token ends a text: all models write equally many.
        jax.block_until_ready(decoding.generate(finished.model, params, ids, mask, new_tokens=count, pad=pad))
        times.append(time.perf_counter() - begin)
    return len(prompts) * count / statistics.median(times[1:])


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
    seconds = step_seconds(pruning.resize(made, kept) if kept else made, options.steps)
    prompts, pad = references.prompts[: options.prompts], references.pad
    del made
    written = written_per_second(options.run, prompts, pad, config.generate.new_tokens)
    print(json.dumps({"seconds_per_step": seconds, "written_tokens_per_second": written}))


if __name__ == "__main__":
    main()
