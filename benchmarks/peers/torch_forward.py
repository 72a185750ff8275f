"""Side: logits of a batch by transformers in PyTorch: eager, compiled, or compiled with frozen weights."""

import os
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from transformers import AutoModelForSequenceClassification, logging

from benchmarks.peers import child, inputs


def prepare(case: dict[str, Any]) -> child.Side:
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        case["model"], num_labels=2, attn_implementation="sdpa"
    )
    model.eval()
    ids = inputs.ids(case, model.config.vocab_size)
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    # Inductor reads the setting when the first call compiles, which has to be in inference mode.
    torch._inductor.config.freezing = case["form"] == "frozen"
    forward = model if case["form"] == "eager" else torch.compile(model)

    @torch.inference_mode()
    def call() -> np.ndarray:
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return forward(**batch).logits.numpy()

    check = {"logits": call()[: inputs.CHECKED].astype(np.float64).tolist()}
    facts = {
        "call": "from token ids on the host to logits on the host, inference mode",
        "device": "cpu",
        "threads": str(torch.get_num_threads()),
        "versions": child.versions("torch", "transformers"),
    }
    return child.Side(child.repeated(call, case), facts, check)


if __name__ == "__main__":
    child.serve(prepare)
