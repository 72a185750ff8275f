"""Side: loading a checkpoint by transformers: seconds, and the peak memory of the process above its state before."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, logging

from benchmarks.peers import child, shapes


def prepare(case: dict[str, Any]) -> child.Side:
    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
    for file in Path(case["model"]).glob("*.safetensors"):
        child.read_through(file)
    causal = shapes.task(case["shape"]) == "causal-lm"
    # The classes of AutoModel would import these during the measurement.
    kind: Any = LlamaForCausalLM if causal else BertForSequenceClassification
    before, begin = child.peak(), time.perf_counter()
    model = kind.from_pretrained(case["model"], dtype=getattr(torch, case["dtype"]))
    # Mapped weights are read when they are first used.
    total = sum(float(parameter.detach().reshape(-1)[::1024].float().sum()) for parameter in model.parameters())
    seconds = time.perf_counter() - begin
    raised, weights = child.peak() - before, sum(each.numel() * each.element_size() for each in model.parameters())
    facts = {
        "weights_bytes": weights,
        "raised_over_weights": raised / weights,
        "sum": total,
        "state": "PyTorch and the class are imported; the file is in the page cache; a number of each page of weights is read",
        "threads": str(torch.get_num_threads()),
        "versions": child.versions("torch", "transformers"),
    }
    return child.Side(child.once({"seconds": seconds, "raised_bytes": raised}), facts, {"bytes": weights})


if __name__ == "__main__":
    child.serve(prepare)
