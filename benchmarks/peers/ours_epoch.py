"""Side: one pass over a data set with the batches, the step and the evaluation of a run of this library, real lengths."""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import child, ours_train
from dsee_jax import config as configs
from dsee_jax.data.batches import Batches, iterate
from dsee_jax.train import optim, programs, pruning, setup, sharding, trainer
from dsee_jax.train.step import State

INCLUDES = (
    "batches of similar length, assembled by a thread, and for each the training step; the loss is read every "
    f"{trainer.LOG_EVERY} steps. Without tokenising, compiling and evaluation"
)


def prepare(case: dict[str, Any]) -> child.Side:
    config = configs.Config(
        model=configs.ModelConfig(path=case["model"], new_head=True),
        data=configs.DataConfig(source="glue", task=case["task"], dir=case["data"], max_length=case["length"]),
        delta=configs.DeltaConfig(rank=case["rank"], alpha=32, nonzeros=case["nonzeros"], support="random"),
        prune=configs.PruneConfig(kind="none"),
        train=configs.TrainConfig(epochs=1, batch_size=case["batch"], learning_rate=5e-4, head="pooler+classifier"),
        output_dir=os.path.join(case["scratch"], "run"),
    )
    ready = setup.prepare(config)
    compiled, frozen = programs.make_programs(ready), sharding.place(ready.placed, pruning.freeze(ready, {}))

    def start() -> State:
        begin = State(jnp.zeros((), jnp.int32), trainer.copy(ready.trained), compiled.optimizer.init(ready.trained))
        return sharding.place(ready.placed, begin)

    def batches(seed: int) -> Batches:
        return Batches(ready.data.train, case["batch"], epochs=1, seed=seed, edges=ready.data.edges)

    rates = optim.schedule(5e-4, len(batches(0)), 0.1)
    source = batches(0)
    for length in map(int, ready.data.edges):
        # A length compiles once for each type of its arguments: the first state, the states after it, a rate.
        ones = np.ones((case["batch"], length), np.int32)
        batch = source[0] | {"input_ids": ones, "attention_mask": ones, "token_type_ids": 0 * ones}
        rows = sharding.split(ready.placed.mesh, batch)
        state, _ = compiled.step(start(), frozen, rows, jax.random.key(0), rates(0), None)
        jax.block_until_ready(compiled.step(state, frozen, rows, jax.random.key(0), rates(0), None))
    compiled.evaluate(start().trained, frozen)
    step: Any = compiled.step
    programs_ready = step._cache_size()

    def measure(number: int) -> dict[str, float]:
        state = start()
        key = jax.random.key(number)
        jax.block_until_ready(state)
        begin = time.perf_counter()
        for done, batch in enumerate(iterate(batches(number)), 1):
            rows = sharding.split(ready.placed.mesh, batch)
            state, loss = step(state, frozen, rows, key, rates(done - 1), None)
            if done % trainer.LOG_EVERY == 0:
                jax.block_until_ready(loss)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin
        assert step._cache_size() == programs_ready, "a step compiled while it was measured"
        return {"seconds": seconds, "accuracy": compiled.evaluate(state.trained, frozen)["accuracy"]}

    facts = {
        "epoch": INCLUDES,
        "steps": len(source),
        "tokens": int(ready.data.train.lengths.sum()),
        "positions": sum(batch["input_ids"].size for batch in source),
        "lengths_compiled": len(ready.data.edges),
        "dropout": ours_train.dropout(ready.model.config),
        "device": jax.devices()[0].device_kind,
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib", "flax", "optax"),
    }
    return child.Side(measure, facts, {"tokens": facts["tokens"], "dropout": facts["dropout"]})


if __name__ == "__main__":
    child.serve(prepare)
