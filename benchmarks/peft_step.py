"""Time the LoRA training step of Hugging Face PEFT (PyTorch), the counterpart of `benchmarks.train_step`.

``python -m benchmarks.peft_step --model HF_DIR --batch 8 --length 128 --steps 6 --seconds-only``

The setup follows `benchmarks.train_step`: rank 16 on query and value, the head (pooler and classifier) trained in full,
dropout on, gradient clipped to norm 1, AdamW, float32, rows without padding. Needs the extra `bench`.
"""

import argparse
import json
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="number of timed steps, after --warmup steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds-only", action="store_true", help="print only the seconds of each step, one per line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()

    model = AutoModelForSequenceClassification.from_pretrained(arguments.model, num_labels=2)
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=arguments.rank,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"],
    )
    model = get_peft_model(model, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.01)
    shape = (arguments.batch, arguments.length)
    batch = {
        "input_ids": torch.randint(1, model.config.vocab_size, shape),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "token_type_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, (arguments.batch,)),
    }

    seconds = []
    for _ in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    seconds = seconds[arguments.warmup :]
    if arguments.seconds_only:
        print("\n".join(f"{value:.4f}" for value in seconds))
    else:
        count = sum(parameter.numel() for parameter in trained)
        print(json.dumps({"seconds": seconds, "median": statistics.median(seconds), "trained_parameters": count}))


if __name__ == "__main__":
    main()
