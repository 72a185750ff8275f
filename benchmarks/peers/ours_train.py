"""Side: training steps of this library, low-rank and sparse updates on the query and value kernels."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsee_jax
from benchmarks.peers import child, inputs, shapes
from dsee_jax import models, tree
from dsee_jax.config import DeltaConfig, TrainConfig
from dsee_jax.train import losses, optim, step

INCLUDES = (
    "forward with dropout, backward, clipping to norm 1, AdamW; the host waits for the device after the last step"
)


def prepare(case: dict[str, Any]) -> child.Side:
    causal, dtype = shapes.task(case["shape"]) == "causal-lm", case["dtype"]
    options = {"scan": case["scan"], "remat": case["remat"]} if causal else {}
    model, params = dsee_jax.load_pretrained(
        case["model"], shapes.task(case["shape"]), num_labels=2, dtype=dtype, param_dtype=dtype, **options
    )
    # The shapes do not depend on the choice of the coordinates; random coordinates are the cheapest.
    sizes = {"rank": case["rank"], "alpha": 32, "nonzeros": case["nonzeros"]}
    if model.config.model_type == "gpt2":
        # Its query, key and value are one kernel for the other sides.
        sizes["targets"] = (r".*/attention/(query|key|value)/kernel",)
    delta = DeltaConfig(support="random", **sizes)
    adapter = dsee_jax.deltas.init(params, delta, key=jax.random.key(0))
    # A decoder has no task head.
    heads = () if causal else tree.select(models.find(model.config.model_type).head, tree.flatten(params))
    head, rest = tree.split(params, heads)
    optimizer = optim.adamw(dataclasses.replace(TrainConfig(), clip=1.0, weight_decay=0.01))
    # As in a run, what is trained is float32.
    trained = {"deltas": adapter.deltas, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), head)}
    frozen = step.Frozen(rest, adapter.supports, {})
    batch = _batch(case, model.config.vocab_size)

    @jax.jit
    def checked(trained: Any, frozen: step.Frozen, batch: Any) -> tuple[jax.Array, jax.Array]:
        logits = step.predict(model, trained, frozen, batch, delta, deterministic=True)
        weights = batch["weights"]
        loss = jnp.sum(losses.cross_entropy(logits, batch) * weights) / jnp.sum(weights)
        return loss, logits if not causal else logits[:, -1]

    loss, logits = checked(trained, frozen, batch)
    check = {"loss": float(loss), "logits": np.asarray(logits[: inputs.CHECKED], np.float64)[:, :100].tolist()}
    check |= {"dropout": dropout(model.config)} | _sizes(params, adapter.deltas, head)
    if model.config.model_type != "gpt2":  # whose updated kernel is another one for the other sides
        tuned = {"deltas": _factors(adapter.deltas), "params": trained["params"]}
        check["tuned_loss"] = float(checked(tuned, frozen, batch)[0])
    state = step.State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    update = jax.jit(step.train_step(model, optimizer, delta), donate_argnums=0)
    key, rate = jax.random.key(0), np.float32(5e-4)

    def call() -> tuple[step.State, jax.Array]:
        nonlocal state
        state, loss = update(state, frozen, batch, key, rate)
        return state, loss

    measure = child.repeated(call, case, finish=jax.block_until_ready)
    facts = {
        "step": INCLUDES,
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "dropout": check["dropout"],
        "device": jax.devices()[0].device_kind,
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib", "flax", "optax"),
    }

    def figures(number: int) -> dict[str, float]:
        step = measure(number) | {"peak_bytes": _peak()}
        return step if number else step | {"matmul_flops_per_second": _matmul_rate(dtype)}

    return child.Side(figures, facts, check)


def dropout(config: Any) -> float:
    """Return the highest dropout rate of a model."""
    rates = (getattr(config, field.name) for field in dataclasses.fields(config) if "drop" in field.name)
    return max(rate for rate in rates if rate is not None)


def _factors(deltas: Any) -> Any:
    """Return updates of the factors that all sides have: their scale, and where they are added, decide the loss."""
    arrays = {
        path: jnp.broadcast_to(inputs.factor(path[-1], *leaf.shape[-2:]), leaf.shape)
        if path[-2:] in ("/a", "/b")
        else leaf
        for path, leaf in tree.flatten(deltas).items()
    }
    return tree.unflatten(arrays)


def _sizes(params: Any, deltas: Any, head: Any) -> dict[str, int]:
    """Return how many numbers are trained, by kind, and how many the updated kernels have."""
    arrays, kernels = tree.flatten(deltas), tree.flatten(params)
    sparse = sum(leaf.size for path, leaf in arrays.items() if path.endswith("/values"))
    return {
        "low_rank_parameters": sum(leaf.size for leaf in arrays.values()) - sparse,
        "sparse_parameters": sparse,
        "head_parameters": sum(leaf.size for leaf in jax.tree.leaves(head)),
        "updated_weights": sum(kernels[path].size for path in {path.rpartition("/")[0] for path in arrays}),
    }


def _batch(case: dict[str, Any], vocabulary: int) -> dict[str, np.ndarray]:
    ids = inputs.ids(case, vocabulary).astype(np.int32)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    if shapes.task(case["shape"]) == "causal-lm":
        weights = np.ones(ids.shape, np.float32)
        # The last token has no next one.
        weights[:, -1] = 0
        return batch | {"labels": np.roll(ids, -1, 1), "weights": weights}
    return batch | {"labels": inputs.labels(case).astype(np.int32), "weights": np.ones(len(ids), np.float32)}


def _matmul_rate(dtype: str) -> float:
    """Return the FLOPs per second of a large square product."""
    size = 8192 if jax.devices()[0].platform != "cpu" else 1024
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a: a @ a)
    measured = child.repeated(lambda: product(a), {"warmup": 2, "round": 0.3}, finish=jax.block_until_ready)(0)
    return 2.0 * size**3 / measured["seconds"]


def _peak() -> int:
    """Return the peak bytes of the accelerator, else of the process."""
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else child.peak()


if __name__ == "__main__":
    child.serve(prepare)
