"""Side: new tokens after a batch of prompts by ``generate`` of transformers, with its default or its static cache."""

import os
import warnings
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompileConfig, logging

from benchmarks.peers import child, inputs


def prepare(case: dict[str, Any]) -> child.Side:
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
    model: Any = AutoModelForCausalLM.from_pretrained(case["model"], attn_implementation="sdpa")
    model.eval()
    prompts = inputs.ids(case, model.config.vocab_size)
    model.generation_config.eos_token_id = None
    options = {
        "max_new_tokens": case["new"],
        "num_beams": case["beams"],
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    if case["cache"]:
        # transformers compiles the step of a static cache on accelerators alone, unless it is told otherwise.
        compiled: Any = CompileConfig(mode="default", fullgraph=False)
        compiled._compile_all_devices = True
        options |= {"cache_implementation": case["cache"], "compile_config": compiled}

    @torch.inference_mode()
    def call() -> np.ndarray:
        ids = torch.from_numpy(prompts)
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, case["length"] :].numpy()

    with torch.inference_mode():
        first = model(torch.from_numpy(prompts)).logits[: inputs.CHECKED, -1, :100].double().numpy()
        tokens = call()[: inputs.CHECKED]
        texts = torch.from_numpy(np.concatenate([prompts[: inputs.CHECKED], tokens], 1))
        before = model(texts).logits[:, case["length"] - 1 : -1].numpy()
    check = {"logits": first.tolist()} | inputs.chosen(before, tokens, case["beams"])
    facts = {
        "call": "from prompts on the host to tokens on the host; no text ends early",
        "device": "cpu",
        "threads": str(torch.get_num_threads()),
        "versions": child.versions("torch", "transformers"),
    }
    return child.Side(child.repeated(call, case), facts, check)


if __name__ == "__main__":
    child.serve(prepare)
