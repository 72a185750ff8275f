"""Write a text classifier as ONNX, by the exporter of PyTorch: ``python -m benchmarks.peers.onnx_export MODEL_DIR FILE``."""

import os
import sys
from pathlib import Path

import torch
from torch.export import Dim
from transformers import AutoModelForSequenceClassification, logging

NAMES = ("input_ids", "attention_mask", "token_type_ids")


class Logits(torch.nn.Module):
    """The model as a function of three arrays."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=2, attn_implementation="sdpa"
        )

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        """Return the logits of int64 arrays (batch, length)."""
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=kinds).logits


def main(folder: str, path: Path) -> None:
    logging.set_verbosity_error()
    # Three arrays: the exporter takes the same array twice for one input.
    example = tuple(torch.ones(2, 16, dtype=torch.long) for _ in NAMES)
    dimensions = {0: Dim("batch"), 1: Dim("length", max=512)}
    # The file is complete or absent.
    partial = path.with_suffix(".partial.onnx")
    torch.onnx.export(
        Logits(folder).eval(),
        example,
        partial,
        input_names=NAMES,
        output_names=["logits"],
        dynamic_shapes=(dimensions,) * 3,
        dynamo=True,
        external_data=False,
    )
    os.replace(partial, path)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
