"""Side: new tokens after a batch of prompts by this library, greedy or by beam search."""

import os
from typing import Any

import jax
import numpy as np

import dsee_jax
from benchmarks.peers import child, inputs


def prepare(case: dict[str, Any]) -> child.Side:
    model, params = dsee_jax.load_pretrained(case["model"], "causal-lm")
    prompts = inputs.ids(case, model.config.vocab_size).astype(np.int32)
    batch = {"input_ids": prompts, "attention_mask": np.ones_like(prompts), "last_only": True}
    logits = jax.jit(lambda params, prompts: dsee_jax.apply(model, params, None, {**batch, "input_ids": prompts}))
    first = np.asarray(logits(params, prompts), np.float64)[: inputs.CHECKED, -1, :100]

    def call() -> np.ndarray:
        return np.asarray(dsee_jax.generate(model, params, prompts, new_tokens=case["new"], beams=case["beams"]))

    tokens = call()[: inputs.CHECKED]
    batch = {"input_ids": np.concatenate([prompts[: inputs.CHECKED], tokens], 1)}
    before = jax.jit(lambda params, batch: dsee_jax.apply(model, params, None, batch)[:, case["length"] - 1 : -1])
    check = {"logits": first.tolist()} | inputs.chosen(np.asarray(before(params, batch)), tokens, case["beams"])
    facts = {
        "call": "from prompts on the host to tokens on the host; no text ends early",
        "device": jax.devices()[0].device_kind,
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib", "flax"),
    }
    return child.Side(child.repeated(call, case), facts, check)


if __name__ == "__main__":
    child.serve(prepare)
