"""Side: training steps of Hugging Face PEFT in PyTorch: LoRA, or Supertuning, its low-rank and sparse update."""

import os
import warnings
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, logging

from benchmarks.peers import child, devices, inputs, shapes

INCLUDES = (
    "forward with dropout, backward, clipping to norm 1, AdamW; the host reads the loss after the last step of a round"
)


def prepare(case: dict[str, Any]) -> child.Side:
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
    torch.manual_seed(0)
    card, dtype = devices.card("torch"), getattr(torch, case["dtype"])
    device = "cuda" if card else "cpu"
    model, trained = adapted(case, dtype)
    model.to(device)
    batch = _batch(case, model.config.vocab_size, device)
    model.eval()
    with torch.no_grad(), precision(device, dtype):
        outputs = model(**batch)
    logits = outputs.logits if outputs.logits.ndim == 2 else outputs.logits[:, -1]
    logits = logits[: inputs.CHECKED].double().cpu().numpy()[:, :100]
    check = {"loss": outputs.loss.item(), "logits": logits.tolist(), "dropout": dropout(model)} | _sizes(model)
    del outputs
    if model.config.model_type != "gpt2":  # whose updated kernel is another one for the first side
        with precision(device, dtype):
            check["tuned_loss"] = _tuned_loss(model, batch)
    model.train()
    forward = torch.compile(model) if case["compile"] else model
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.01)

    def call() -> torch.Tensor:
        with precision(device, dtype):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    measure = child.repeated(call, case, finish=lambda loss: loss.item())
    facts = {
        "step": INCLUDES,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "dropout": check["dropout"],
        "device": card or "cpu",
        "threads": str(torch.get_num_threads()),
        "versions": child.versions("torch", "peft", "transformers"),
    }

    def figures(number: int) -> dict[str, float]:
        step = measure(number) | {"peak_bytes": _peak(device)}
        return step if number else step | {"matmul_flops_per_second": _matmul_rate(device, dtype)}

    return child.Side(figures, facts, check)


def precision(device: str, dtype: torch.dtype) -> torch.autocast:
    """Return the context of a call of the model: automatic mixed precision for bfloat16 on a GPU, as by Trainer(bf16=True).

    PEFT keeps its updates in float32, and without this context multiplies them in float32.
    """
    return torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda" and dtype == torch.bfloat16)


def dropout(model: Any) -> float:
    """Return the highest rate of the dropout layers."""
    return max((module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)), default=0.0)


def adapted(case: dict[str, Any], dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """Return the model with its updates, and the trained parameters."""
    causal = shapes.task(case["shape"]) == "causal-lm"
    kind = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    options = {} if causal else {"num_labels": 2}
    model = kind.from_pretrained(case["model"], dtype=dtype, attn_implementation="sdpa", **options)
    targets = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}[model.config.model_type]
    # c_attn is query, key and value, which share one factor. 1.5 times the rank has the parameters of three updates.
    rank = case["rank"] * 3 // 2 if targets == ["c_attn"] else case["rank"]
    common: dict[str, Any] = {"target_modules": targets, "r": rank, "lora_alpha": 32 * rank // case["rank"]}
    if not causal:
        common |= {"task_type": "SEQ_CLS", "modules_to_save": ["pooler", "classifier"]}
    if case["update"] == "supertuning":
        from peft import SupertuningConfig

        # One share for query and value, which are of different sizes in some decoders: their sum has the nonzeros of both.
        _, width, keys, *_ = shapes.sizes(case["shape"])
        sparsity = 1 - (2 * case["nonzeros"] + 0.25) / (width * (width + keys))
        config: Any = SupertuningConfig(sparsity=sparsity, **common)
    else:
        config = LoraConfig(lora_dropout=0.0, **common)
    model: Any = get_peft_model(model, config)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def _tuned_loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Return the loss with the factors that all sides have: the scale of updates, and where they are added, decide it."""
    low_rank = {name: each for name, each in model.named_parameters() if each.requires_grad and "lora_" in name}
    before = {name: each.clone() for name, each in low_rank.items()}
    for name, each in low_rank.items():
        # A linear layer has its weight as (out, in).
        value = inputs.factor("a" if "lora_A" in name else "b", *each.T.shape)
        each.copy_(torch.from_numpy(value).T)
    loss = model(**batch).loss.item()
    for name, each in low_rank.items():
        each.copy_(before[name])
    return loss


def _sizes(model: Any) -> dict[str, int]:
    """Return how many numbers are trained, by kind, and how many the updated kernels have."""
    trained = {name: each.numel() for name, each in model.named_parameters() if each.requires_grad}
    head = sum(count for name, count in trained.items() if "modules_to_save" in name)
    sparse = sum(count for name, count in trained.items() if "supertuning_values" in name)
    updated = sum(module.base_layer.weight.numel() for module in model.modules() if hasattr(module, "base_layer"))
    sizes = {
        "low_rank_parameters": sum(trained.values()) - head - sparse,
        "head_parameters": head,
        "updated_weights": updated,
    }
    return sizes | ({"sparse_parameters": sparse} if sparse else {})


def _batch(case: dict[str, Any], vocabulary: int, device: str) -> dict[str, torch.Tensor]:
    ids = inputs.ids(case, vocabulary)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if shapes.task(case["shape"]) == "causal-lm":
        batch |= {"labels": ids}
    else:
        batch |= {"token_type_ids": np.zeros_like(ids), "labels": inputs.labels(case)}
    return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of a large square product."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, dtype=dtype, device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    measured = child.repeated(lambda: a @ a, {"warmup": 2, "round": 0.3}, finish=lambda _: wait())(0)
    return 2.0 * size**3 / measured["seconds"]


def _peak(device: str) -> int:
    """Return the peak bytes of the accelerator, else of the process."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else child.peak()


if __name__ == "__main__":
    child.serve(prepare)
