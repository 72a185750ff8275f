"""Peak host memory of tuning a large Llama by DSEE on the CPU, and the parts of this peak.

``python -m benchmarks.llama_memory`` writes and prints ``benchmarks/results/llama_memory.json``. The model has 1.1 billion
random weights in bfloat16 (the shape of TinyLlama), on disk in shards. The updates have rank 16 and 64 nonzeros on query and
value, a step trains on one text of 512 tokens, and layers are scanned and rematerialised in the backward pass. One process
writes the checkpoint and another tunes the model, because ``ru_maxrss`` is the peak of a process. Needs 3 GB of disk.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

from benchmarks.machine import peak

RESULT = pathlib.Path(__file__).parent / "results" / "llama_memory.json"
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}


def make(folder: pathlib.Path, layers: int) -> None:
    """Write the checkpoint in shards of 500 MB: matrices are normal with standard deviation 0.02, vectors are 1."""
    import jax.numpy as jnp
    import numpy as np

    from dsee_jax.ckpt import hf_names, tensors
    from dsee_jax.models import llama

    settings = SHAPE | {"num_hidden_layers": layers}
    model = llama.Llama(llama.Config.from_hf(settings))
    generator, arrays = np.random.default_rng(0), {}
    for name, shape in hf_names.stored_shapes(model).items():
        array = generator.standard_normal(shape, np.float32) * 0.02 if len(shape) > 1 else np.ones(shape, np.float32)
        arrays[name] = array.astype(jnp.bfloat16)
    folder.mkdir(parents=True)
    tensors.write(folder, arrays, max_shard_size="500MB")
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def measure(folder: pathlib.Path, length: int, steps: int) -> None:
    """Load the checkpoint, create the updates and do some steps; print the memory after each phase in bytes."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dsee_jax
    from dsee_jax.config import TrainConfig
    from dsee_jax.deltas import create
    from dsee_jax.deltas.adapter import count
    from dsee_jax.train import optim, step

    jax.block_until_ready(jnp.arange(8) + 1)
    figures: dict[str, float] = {"peak_before": peak()}
    model, params = dsee_jax.load_pretrained(
        folder, "causal-lm", scan=True, remat=True, dtype="bfloat16", param_dtype="bfloat16"
    )
    leaves = jax.tree.leaves(params)
    figures |= {"parameters": sum(leaf.size for leaf in leaves), "weights_bytes": sum(leaf.nbytes for leaf in leaves)}
    figures["largest_shard_bytes"] = max(path.stat().st_size for path in folder.glob("*.safetensors"))
    figures["peak_loaded"] = peak()
    config = dsee_jax.DeltaConfig(targets=("decoder/.*/(query|value)/kernel",), rank=16, alpha=32, nonzeros=64)
    adapter = create.init(params, config, key=jax.random.key(0))
    figures |= {"trained": count(adapter.deltas), "peak_supports": peak()}
    optimizer = optim.adamw(TrainConfig())
    trained = {"deltas": adapter.deltas, "params": {}}
    state = step.State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))
    frozen = step.Frozen(params, adapter.supports, {})
    generator = np.random.default_rng(0)
    ids = generator.integers(0, SHAPE["vocab_size"], (1, length), dtype=np.int32)
    ones = np.ones((1, length), np.int32)
    batch = {"input_ids": ids, "attention_mask": ones, "token_type_ids": 0 * ones}
    batch |= {"labels": np.roll(ids, -1, 1), "weights": ones.astype(np.float32)}
    run = jax.jit(step.train_step(model, optimizer, config), donate_argnums=0)
    args = (frozen, batch, jax.random.key(0), jnp.float32(1e-3))
    begin = time.perf_counter()
    compiled = run.lower(state, *args).compile()
    figures["compile_seconds"] = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    for name in ("argument", "temp", "output", "alias", "generated_code"):
        figures[f"program_{name}_bytes"] = getattr(memory, f"{name}_size_in_bytes")
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        state, loss = compiled(state, *args)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - begin)
    figures["peak"] = peak()
    print(json.dumps(figures | {"losses": losses, "step_seconds": seconds, "length": length}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="default: %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens per text; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--make", type=pathlib.Path, metavar="DIR", help="only write the checkpoint")
    parser.add_argument(
        "--measure", type=pathlib.Path, metavar="DIR", help="only tune the checkpoint in DIR and print the figures"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULT, help="output file; default: %(default)s")
    options = parser.parse_args()
    if options.make:
        return make(options.make, options.layers)
    if options.measure:
        return measure(options.measure, options.length, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = pathlib.Path(folder) / "llama"
        this = [sys.executable, "-m", "benchmarks.llama_memory", f"--layers={options.layers}"]
        subprocess.run([*this, "--make", checkpoint], check=True)
        sizes = [f"--length={options.length}", f"--steps={options.steps}"]
        done = subprocess.run([*this, *sizes, "--measure", checkpoint], check=True, stdout=subprocess.PIPE, text=True)
    import jax

    figures = {
        "command": " ".join(["python -m benchmarks.llama_memory", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "jax": jax.__version__,
        **json.loads(done.stdout.splitlines()[-1]),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    from dsee_jax.runtime import files

    files.write(options.out, figures)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
