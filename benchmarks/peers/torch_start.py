"""Side: Hugging Face PEFT under the Trainer of transformers, from the start of the process to the end of its first step."""

import os
from typing import Any

from benchmarks.peers import child

INCLUDES = "Python, imports, model, data and tokenising, LoRA, Trainer, first step"


def prepare(case: dict[str, Any]) -> child.Side:
    import torch
    from transformers import (
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        logging,
    )

    from benchmarks.peers import torch_train
    from benchmarks.peers.torch_epoch import rows

    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ["PEERS_THREADS"]))
    model, _ = torch_train.adapted(case, torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(case["model"])
    train: Any = rows(tokenizer, case, "train")
    seconds = 0.0

    class First(TrainerCallback):
        """Takes the time after the first step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
            nonlocal seconds
            seconds = child.age()
            control.should_training_stop = True
            return control

    arguments = TrainingArguments(
        os.path.join(case["scratch"], f"trainer-{os.getpid()}"),
        per_device_train_batch_size=case["batch"],
        max_steps=2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, DataCollatorWithPadding(tokenizer), train, callbacks=[First()]).train()
    facts = {
        "start": INCLUDES,
        "threads": str(torch.get_num_threads()),
        "versions": child.versions("torch", "peft", "transformers", "accelerate"),
    }
    return child.Side(child.once({"seconds": seconds}), facts, {})


if __name__ == "__main__":
    child.serve(prepare)
