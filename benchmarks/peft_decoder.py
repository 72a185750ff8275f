"""A decoder tuned by PEFT (PyTorch) on the tokens of `benchmarks.decoder_tokens`: a peer of `benchmarks.decoders`.

``python -m benchmarks.peft_decoder TOKENS.npz OUT --method lora --rank 8 --alpha 16 --rate 9e-4 --seed 0``

Model, token ids, batches and their order, loss weights, learning rates, warm-up, weight decay (of matrices), clipping and the
choice of the best step are those of the library's run; float32, no dropout, and updates on all linear layers of the decoder.
Texts are greedy. Writes ``peer.json``, ``texts.jsonl`` and ``adapter/`` to OUT. The newest state is kept there too: an
interrupted run resumes, and gives the same figures. ``--speed N`` prints the speed of N steps and of writing instead, as
JSON, by the protocol of `benchmarks.timed_steps`. This module needs torch, transformers and peft, and nothing of this library.
"""

import argparse
import importlib.metadata
import json
import math
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    ShiraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks import timed_steps

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAVE_EVERY = 50
"""Steps between saved states, besides those at evaluations."""


def adapter(method: str, rank: int, alpha: float, seed: int) -> PeftConfig:
    """Return the config of a method: lora, rslora (scale alpha / sqrt(rank)) or shira (as many values as LoRA of the rank)."""
    if method == "shira":
        return ShiraConfig(r=rank, target_modules=TARGETS, random_seed=seed, task_type="CAUSAL_LM")
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=TARGETS,
        use_rslora=method == "rslora",
        task_type="CAUSAL_LM",
    )


class Tokens:
    """The file of `benchmarks.decoder_tokens`."""

    def __init__(self, path: Path):
        self.arrays = dict(np.load(path))
        self.about = json.loads(str(self.arrays.pop("about")))

    def size(self, name: str) -> int:
        """Return the number of batches of a set."""
        return len(self.arrays[f"{name}_lengths"])

    def rows(self, name: str, number: int) -> dict[str, np.ndarray]:
        """Return the arrays of a batch (`timed_steps.ARRAYS`), (rows, length)."""
        length = int(self.arrays[f"{name}_lengths"][number])
        return {each: self.arrays[f"{name}_{each}"][number][:, :length] for each in timed_steps.ARRAYS}

    def batch(self, name: str, number: int) -> dict[str, torch.Tensor]:
        """Return a batch: inputs for the model, labels and weights."""
        rows = {each: torch.from_numpy(array) for each, array in self.rows(name, number).items()}
        segments = rows["segments"]
        return {
            **{"ids": rows["ids"].long(), "segments": segments, "labels": rows["labels"].long()},
            **{"weights": rows["weights"], **_attention(segments)},
        }


def _attention(segments: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the mask (rows, 1, length, length) and the positions of packed rows: texts do not attend to each other."""
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # Padding attends to itself: a row of the mask without any token has no softmax.
    mask = (same & causal) | torch.eye(length, dtype=torch.bool)
    places = torch.arange(length).expand_as(segments)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    first = torch.where(begins, places, 0).cummax(dim=1).values
    return {"mask": mask[:, None], "positions": places - first}


def losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the losses of the weighted tokens, and the sum of their weights."""
    logits = model(
        input_ids=batch["ids"], attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
    ).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
    weights = batch["weights"].flatten()
    return (each * weights).sum(), weights.sum()


@torch.no_grad()
def evaluate(model: Any, tokens: Tokens, name: str) -> float:
    """Return the mean loss of a set, in nats per token."""
    model.eval()
    sums = [losses(model, tokens.batch(name, number)) for number in range(tokens.size(name))]
    total, count = (sum(float(each[part]) for each in sums) for part in range(2))
    return total / count


def padded(tokens: Tokens, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of prompts and their mask (rows, longest), padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[tokens.about["pad"]] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def write(model: Any, tokens: Tokens, ids: torch.Tensor, mask: torch.Tensor, least: int = 0) -> torch.Tensor:
    """Return the new ids (rows, new) of each prompt of one batch, with its end; at least ``least`` of them."""
    model.eval()
    about = tokens.about
    options = GenerationConfig(
        max_new_tokens=about["new_tokens"],
        min_new_tokens=least,
        do_sample=False,
        eos_token_id=about["ends"],
        pad_token_id=about["pad"],
    )
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=options)[:, ids.shape[1] :]


def texts(model: Any, tokens: Tokens) -> list[str]:
    """Return the text that follows each prompt, up to the first end."""
    tokenizer, about = AutoTokenizer.from_pretrained(tokens.about["model"]), tokens.about
    written = []
    for start in range(0, len(about["prompts"]), about["batch_size"]):
        rows = about["prompts"][start : start + about["batch_size"]]
        for row, new in zip(rows, write(model, tokens, *padded(tokens, rows)).tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in about["ends"]), len(new))
            before = tokenizer.decode(row, skip_special_tokens=True)
            written.append(tokenizer.decode(row + new[:end], skip_special_tokens=True)[len(before) :].strip())
    return written


class Training:
    """The model, its optimiser, and the state of a run."""

    def __init__(self, tokens: Tokens, config: PeftConfig, rate: float, seed: int):
        torch.manual_seed(seed)
        self.tokens = tokens
        base = AutoModelForCausalLM.from_pretrained(tokens.about["model"], dtype=torch.float32)
        self.total = sum(parameter.numel() for parameter in base.parameters())
        self.model: Any = get_peft_model(base, config)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        decay = tokens.about["weight_decay"]
        groups = [
            {"params": [each for each in self.trained if (each.ndim > 1) == matrix], "weight_decay": decay * matrix}
            for matrix in (True, False)
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
        self.rates = rate * tokens.arrays["rates"]

    def step(self, number: int, batch: dict[str, torch.Tensor]) -> float:
        """Do a step on a batch, with the learning rate of step ``number``; return its loss."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.rates[number])
        total, count = losses(self.model, batch)
        loss = total / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.tokens.about["clip"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return a copy of the adapter."""
        return {name: value.detach().clone() for name, value in get_peft_model_state_dict(self.model).items()}


def save(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    torch.save(content, partial)
    os.replace(partial, path)


def run(training: Training, out: Path) -> dict[str, Any]:
    """Train, or train on from the newest state in ``out``; return the figures of the best step."""
    tokens, steps, file = training.tokens, len(training.rates), out / "state.pt"
    due = set(tokens.about["evaluations"])
    if file.exists():
        state = torch.load(file, weights_only=False)
        set_peft_model_state_dict(training.model, state["weights"])
        training.optimizer.load_state_dict(state["optimizer"])
    else:
        before = {name: evaluate(training.model, tokens, name) for name in ("choose", "score", "held")}
        state = {"step": 0, "before": before, "losses": [], "seconds": [], "tokens": 0, "evaluations": [], "best": None}
    for number in range(state["step"], steps):
        begin = time.perf_counter()
        batch = tokens.batch("train", number)
        state["losses"].append(training.step(number, batch))
        state["seconds"].append(time.perf_counter() - begin)
        state["tokens"] += int((batch["segments"] > 0).sum())
        state["step"] = done = number + 1
        if done in due:
            value = evaluate(training.model, tokens, "choose")
            state["evaluations"].append({"step": done, "loss": value})
            if math.isfinite(value) and (state["best"] is None or value < state["best"]["loss"]):
                state["best"] = {"step": done, "loss": value, "weights": training.weights()}
            print(f"step {done} of {steps}: loss {value:.4f}", flush=True)
        if done in due or done % SAVE_EVERY == 0:
            save(file, {**state, "weights": training.weights(), "optimizer": training.optimizer.state_dict()})
    if state["best"] is None:
        raise SystemExit("no evaluation has a finite loss")
    set_peft_model_state_dict(training.model, state["best"]["weights"])
    final = {name: evaluate(training.model, tokens, name) for name in ("score", "held")}
    written = texts(training.model, tokens)
    records = [
        {"text": text, "references": given} for text, given in zip(written, tokens.about["references"], strict=True)
    ]
    (out / "texts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    training.model.save_pretrained(out / "adapter")
    figures = {name: state[name] for name in ("before", "losses", "seconds", "tokens", "evaluations")}
    return {
        **figures,
        "best_step": state["best"]["step"],
        "choose": state["best"]["loss"],
        "final": final,
        "trained_parameters": sum(each.numel() for each in training.trained),
        "total_parameters": training.total,
        "file_size": (out / "adapter" / "adapter_model.safetensors").stat().st_size,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "packages": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def speed(training: Training, steps: int, prompts: int) -> dict[str, Any]:
    """Return the median seconds of a step, the tokens written per second with the updates merged, and the digest of both.

    The steps are on the first batches of the run, the texts for its first ``prompts``.
    """
    tokens, numbers = training.tokens, timed_steps.numbers(steps, training.tokens.size("train"))
    rows, count = tokens.about["prompts"][:prompts], tokens.about["new_tokens"]
    ready = [(number, tokens.batch("train", number)) for number in numbers]
    lengths = [batch["ids"].shape[1] for _, batch in ready]
    seconds = timed_steps.median_seconds(lambda each: training.step(*each), ready, lengths)
    model, inputs = training.model.merge_and_unload(), padded(tokens, rows)
    return {
        "seconds_per_step": seconds,
        "digest": timed_steps.digest([tokens.rows("train", number) for number in numbers], rows),
        "written_tokens_per_second": timed_steps.tokens_per_second(
            lambda: write(model, tokens, *inputs, least=count), len(rows) * count
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("lora", "rslora", "shira"), required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", type=int, default=0, metavar="STEPS")
    parser.add_argument("--prompts", type=int, default=16, help="of the measured writing")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    config = adapter(options.method, options.rank, options.alpha, options.seed)
    training = Training(Tokens(options.tokens), config, options.rate, options.seed)
    if options.speed:
        return print(json.dumps(speed(training, options.speed, options.prompts)))
    options.out.mkdir(parents=True, exist_ok=True)
    figures = run(training, options.out)
    figures["config"] = {
        name: value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
        for name, value in config.to_dict().items()
    }
    partial = options.out / ".peer.json"
    partial.write_text(json.dumps(figures))
    os.replace(partial, options.out / "peer.json")


if __name__ == "__main__":
    main()
