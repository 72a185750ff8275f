"""Run the model in this folder; needs jax, flatbuffers, numpy and safetensors. signature.json describes the program.

python run.py '[[101, 7592, 102], [101, 2748, 2003, 102]]'     # rows of token ids, from tokenizer.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file


def load(folder: Path) -> Callable[..., jax.Array]:
    """Return ``(input_ids, attention_mask, token_type_ids) -> logits``; every new (batch, length) is compiled once."""
    program = jax.jit(export.deserialize(bytearray((folder / "model.stablehlo").read_bytes())).call)
    weights = jax.device_put(load_file(folder / "weights.safetensors"))
    return lambda *inputs: program(weights, *inputs)


def rows(text: str, signature: dict[str, Any]) -> list[list[int]]:
    """Return the rows of token ids in a JSON text; raises ValueError for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        raise ValueError("expected rows of token ids, such as [[101, 7592, 102]]")
    size, most = signature["vocab_size"], signature["longest"]
    for number, row in enumerate(value):
        for token in row:
            if type(token) is not int or not 0 <= token < size:
                raise ValueError(f"row {number} has {json.dumps(token)[:40]}; expected token ids from 0 to {size - 1}")
        if most is not None and len(row) > most:
            raise ValueError(f"row {number} has {len(row)} tokens; the model has {most} positions: shorten it")
    return value


def padded(rows: list[list[int]], signature: dict[str, Any]) -> list[np.ndarray]:
    """Return the three inputs, int32 (batch, length), for rows of token ids, one text per row."""
    longest = max(map(len, rows))
    mask = np.array([[place < len(row) for place in range(longest)] for row in rows], np.int32)
    ids = np.full(mask.shape, signature["pad_token_id"], np.int32)
    ids[mask == 1] = np.concatenate(rows)
    return [ids, mask, np.zeros_like(ids)]


if __name__ == "__main__":
    here = Path(__file__).parent
    signature = json.loads((here / "signature.json").read_text(encoding="utf-8"))
    try:
        if len(sys.argv) != 2:
            raise ValueError("give one argument, rows of token ids: python run.py '[[101, 7592, 102]]'")
        inputs = padded(rows(sys.argv[1], signature), signature)
    except ValueError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
    logits = np.asarray(load(here)(*inputs))
    values = logits.astype(object)
    values[~np.isfinite(logits)] = None  # JSON has no such numbers
    print(json.dumps(values.tolist()))
