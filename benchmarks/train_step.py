"""Time the DSEE training step of a Hugging Face model, with the loader, the updates and the step of this library.

``python -m benchmarks.train_step --model HF_DIR --batch 8 --length 128 --steps 6 --seconds-only``

Rank 16 and 64 sparse values on every query and value kernel, the head trained in full, dropout on, gradient clipped to norm
1, AdamW; only updates and head have gradients. ``benchmarks.random_bert`` writes a model, ``benchmarks.peft_step`` times PEFT,
and ``benchmarks.compare_steps`` alternates both.
"""

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsee_jax
from dsee_jax import models, tree
from dsee_jax.config import DeltaConfig, TrainConfig
from dsee_jax.train import optim, step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="number of timed steps, after --warmup steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--nonzeros", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds-only", action="store_true", help="print only the seconds of each step, one per line")
    arguments = parser.parse_args()

    key, rate = jax.random.key(0), np.float32(5e-4)
    model, params = dsee_jax.load_pretrained(arguments.model, num_labels=2, dtype=arguments.dtype)
    # The shapes do not depend on the choice of the coordinates; random coordinates are the cheapest.
    delta = DeltaConfig(rank=arguments.rank, nonzeros=arguments.nonzeros, support="random")
    adapter = dsee_jax.deltas.init(params, delta, key=key)
    head, rest = tree.split(params, tree.select(models.find(model.config.model_type).head, tree.flatten(params)))
    optimizer = optim.adamw(TrainConfig(clip=1.0))
    trained = {"deltas": adapter.deltas, "params": head}
    state = step.State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    frozen = step.Frozen(rest, adapter.supports, {})
    update = jax.jit(step.train_step(model, optimizer, delta), donate_argnums=0)

    rng, shape = np.random.default_rng(0), (arguments.batch, arguments.length)
    batch: dict[str, Any] = {
        "input_ids": rng.integers(1, model.config.vocab_size, shape, np.int32),
        "attention_mask": np.ones(shape, np.int32),
        "token_type_ids": np.zeros(shape, np.int32),
        "labels": rng.integers(0, 2, arguments.batch, np.int32),
        "weights": np.ones(arguments.batch, np.float32),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))

    seconds = []
    for _ in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        state, loss = update(state, frozen, batch, key, rate)
        jax.block_until_ready((state, loss))
        seconds.append(time.perf_counter() - start)
    compiling, seconds = seconds[0], seconds[arguments.warmup :]
    if arguments.seconds_only:
        print("\n".join(f"{value:.4f}" for value in seconds))
    else:
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "median": statistics.median(seconds),
                    "first_step_seconds": compiling,
                    "trained_parameters": count,
                }
            )
        )


if __name__ == "__main__":
    main()
