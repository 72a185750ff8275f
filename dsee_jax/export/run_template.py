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


def padded(rows: list[list[int]], signature: dict[str, Any]) -> list[np.ndarray]:
    """Return the three inputs, int32 (batch, length), for rows of token ids, one text per row."""
    longest, most = max(map(len, rows)), signature["longest"]
    if most is not None and longest > most:
        raise SystemExit(f"a row has {longest} tokens; the model has {most} positions: shorten it")
    mask = np.array([[place < len(row) for place in range(longest)] for row in rows], np.int32)
    ids = np.full(mask.shape, signature["pad_token_id"], np.int32)
    ids[mask == 1] = np.concatenate(rows)
    return [ids, mask, np.zeros_like(ids)]


if __name__ == "__main__":
    here = Path(__file__).parent
    inputs = padded(json.loads(sys.argv[1]), json.loads((here / "signature.json").read_text()))
    logits = np.asarray(load(here)(*inputs))
    values = logits.astype(object)
    values[~np.isfinite(logits)] = None  # JSON has no such numbers
    print(json.dumps(values.tolist()))
