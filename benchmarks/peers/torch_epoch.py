"""Side: one pass over a data set by Hugging Face PEFT with dynamic padding, in random order or grouped by length."""

import copy
import os
import time
import warnings
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, get_linear_schedule_with_warmup, logging
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.peers import child, inputs, torch_train

INCLUDES = (
    "a DataLoader with DataCollatorWithPadding, and for each batch the training step and the learning rate; the loss is read "
    "every 10 steps. Without tokenising and evaluation"
)


def prepare(case: dict[str, Any]) -> child.Side:
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
    torch.manual_seed(0)
    model, trained = torch_train.adapted(case, torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(case["model"])
    collate = DataCollatorWithPadding(tokenizer)
    train, dev = (rows(tokenizer, case, split) for split in ("train", "dev"))
    begin = copy.deepcopy([parameter.detach() for parameter in trained])

    def loader(number: int) -> Any:
        draw = torch.Generator().manual_seed(number)
        if case["grouped"]:
            lengths = [len(row["input_ids"]) for row in train]
            order: Any = LengthGroupedSampler(case["batch"], lengths=lengths, generator=draw)
        else:
            order = torch.utils.data.RandomSampler(train, generator=draw)
        return torch.utils.data.DataLoader(train, case["batch"], sampler=order, collate_fn=collate)

    steps = len(loader(0))

    def epoch(number: int, most: int = steps) -> float:
        """Train from the first state, and return the seconds."""
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter, value in zip(trained, begin, strict=True):
                parameter.copy_(value)
        model.train()
        optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
        start = time.perf_counter()
        for done, batch in zip(range(most), loader(number), strict=False):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (done + 1) % 10 == 0:
                loss.item()
        return time.perf_counter() - start

    def measure(number: int) -> dict[str, float]:
        return {"seconds": epoch(number), "accuracy": _accuracy(model, dev, collate)}

    epoch(0, most=3)
    facts = {
        "epoch": INCLUDES,
        "steps": steps,
        "tokens": sum(len(row["input_ids"]) for row in train),
        "positions": sum(batch["input_ids"].numel() for batch in loader(0)),
        "dropout": torch_train.dropout(model),
        "device": "cpu",
        "threads": str(torch.get_num_threads()),
        "versions": child.versions("torch", "peft", "transformers"),
    }
    return child.Side(measure, facts, {"tokens": facts["tokens"], "dropout": facts["dropout"]})


def rows(tokenizer: Any, case: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Return the tokenised examples of a split."""
    first, second, labels = inputs.texts(case["data"], split)
    encoded = tokenizer(first, second, truncation="longest_first", max_length=case["length"])
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids", "attention_mask")} | {"labels": labels}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _accuracy(model: Any, rows: list[dict[str, Any]], collate: Any) -> float:
    model.eval()
    right = 0
    with torch.inference_mode():
        for batch in torch.utils.data.DataLoader(rows, 32, collate_fn=collate):  # pyright: ignore[reportArgumentType]
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


if __name__ == "__main__":
    child.serve(prepare)
