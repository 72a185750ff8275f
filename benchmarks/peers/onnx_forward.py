"""Side: logits of a batch by ONNX Runtime, of the weights that the other sides have."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.peers import child, inputs, shapes
from benchmarks.peers.rounds import ROOT


def prepare(case: dict[str, Any]) -> child.Side:
    exporter = child.versions("torch", "transformers", "onnxscript")
    path = Path(f"{case['model']}-{'-'.join(exporter.values())}.onnx")
    if not path.exists():
        # In a process of its own: PyTorch takes no part in the measurement.
        command = [sys.executable, "-m", "benchmarks.peers.onnx_export", case["model"], str(path)]
        subprocess.run(command, check=True, cwd=ROOT)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = int(os.environ["PEERS_THREADS"]), 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = inputs.ids(case, shapes.sizes(case["shape"])[-1])
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    # The exporter may leave out an input.
    batch = {entry.name: batch[entry.name] for entry in session.get_inputs()}

    def call() -> np.ndarray:
        return session.run(["logits"], batch)[0]

    check = {"logits": call()[: inputs.CHECKED].astype(np.float64).tolist()}
    facts = {
        "call": "from token ids on the host to logits on the host, all graph optimisations",
        "device": "cpu",
        "threads": str(options.intra_op_num_threads),
        "versions": exporter | child.versions("onnxruntime"),
    }
    return child.Side(child.repeated(call, case), facts, check)


if __name__ == "__main__":
    child.serve(prepare)
