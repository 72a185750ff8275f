"""`python -m merge` next to mergekit on a bfloat16 checkpoint of 1.1 billion parameters and two models tuned from it.

    python -m benchmarks.merge_speed --folder DIR [--mergekit MERGEKIT_YAML] [--rounds 1] [--methods linear ties ...]

DIR gets the generated checkpoints (6.6 GB; made once), and the outputs, each deleted before the next run. MERGEKIT_YAML is
mergekit's command, installed in an environment of its own; without it only ours is timed. Every run is a process of its own,
inputs in the disk's cache, all dirty pages synced before it begins. Ours ends synced to disk; mergekit's time is given without
the sync, which it leaves to the system. Peak memory is anonymous memory, without mapped files.

``--large`` also merges a checkpoint four times as large (4.4 billion parameters; 27 GB of disk) to see that memory does not
follow. Writes benchmarks/results/merge_speed.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml

from dsee_jax.ckpt import tensors

RESULTS = Path(__file__).parent / "results" / "merge_speed.json"
SHAPES = {"small": (22, 2048, 5632, 32000, 32, 4), "large": (29, 3584, 9856, 64000, 32, 8)}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "rankmean": {},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.5},
    "slerp": {},
}
OURS_ONLY = {"rankmean"}


def config(size: str) -> dict[str, Any]:
    """Return the model's config.json."""
    layers, width, hidden, vocabulary, heads, shared = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of the model's tensors."""
    layers, width, hidden, vocabulary, heads, shared = SHAPES[size]
    inner = width // heads * shared
    yield "model.embed_tokens.weight", (vocabulary, width)
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        yield f"{stem}.input_layernorm.weight", (width,)
        yield f"{stem}.self_attn.q_proj.weight", (width, width)
        yield f"{stem}.self_attn.k_proj.weight", (inner, width)
        yield f"{stem}.self_attn.v_proj.weight", (inner, width)
        yield f"{stem}.self_attn.o_proj.weight", (width, width)
        yield f"{stem}.post_attention_layernorm.weight", (width,)
        yield f"{stem}.mlp.gate_proj.weight", (hidden, width)
        yield f"{stem}.mlp.up_proj.weight", (hidden, width)
        yield f"{stem}.mlp.down_proj.weight", (width, hidden)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocabulary, width)


def generate(folder: Path, size: str) -> None:
    """Write a base of random weights and two models tuned from it, 3 shards each, where they are not there yet."""
    named = dict(shapes(size))
    total = 2 * sum(int(np.prod(shape)) for shape in named.values())
    placed = tensors.shards(
        {name: 2 * int(np.prod(shape)) for name, shape in named.items()}, max_shard_size=total * 2 // 5
    )
    for number, model in enumerate(("base", "model_a", "model_b")):
        out = folder / model
        if (out / "config.json").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        for file, names in placed.items():
            tensors.write(out, {name: _weights(name, named[name], number) for name in names})
            (out / tensors.SINGLE).replace(out / file)
        (out / tensors.INDEX).write_text(tensors.index_text(placed, total))
        # Last: says that the model is whole.
        (out / "config.json").write_text(json.dumps(config(size), indent=1))


def _weights(name: str, shape: tuple[int, ...], model: int) -> np.ndarray:
    seed = [ord(letter) for letter in name]
    weights = _normal(seed, shape) * np.float32(0.02)
    if model:
        # What tuning does is small beside the weights, and differs from layer to layer.
        scale = np.random.default_rng([*seed, model]).uniform(0.5, 2)
        weights += _normal([*seed, model], shape) * np.float32(2e-4 * scale)
    return weights.astype(ml_dtypes.bfloat16)


def _normal(seed: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Return normal numbers; those of a large tensor repeat, for drawing them all would take longer than all merges."""
    return np.resize(np.random.default_rng(seed).standard_normal(1 << 22, np.float32), shape)


def recipe(folder: Path, method: str) -> Path:
    """Write the recipe, in mergekit's grammar."""
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight, **METHODS[method]}}
        for name, weight in (("model_a", 0.4), ("model_b", 0.6))
    ]
    said: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        said["base_model"] = str(folder / "base")
    if method == "slerp":
        said |= {"base_model": str(folder / "model_a"), "parameters": {"t": 0.4}}
    if method in ("slerp", "rankmean"):
        for model in models:
            del model["parameters"]
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(said, sort_keys=False))
    return path


def timed(command: list[str], out: Path) -> dict[str, float]:
    """Run a command that writes ``out``; return its seconds, those with a sync after it, and its peak memory in GB."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read() if process.stderr else ''}")
    os.sync()
    synced = time.perf_counter() - start
    shutil.rmtree(out)
    return {"seconds": seconds, "synced_seconds": synced, "peak_gb": peak / 1e9}


def _anonymous(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def floor(folder: Path) -> dict[str, float]:
    """Measure this machine: GB/s of reading files in the disk's cache, of copying memory, and of a synced write."""
    file = next((folder / "base").glob("*.safetensors"))
    size, block = file.stat().st_size, np.empty(1 << 26, np.uint8)
    other = np.ones_like(block)

    def read() -> None:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(block):
                pass

    def write() -> None:
        with (folder / "written").open("wb", buffering=0) as opened:
            for _ in range(8):
                opened.write(other)
                os.fdatasync(opened.fileno())

    rates = {}
    for name, act, nbytes in (
        ("cached_read", read, size),
        ("copy", lambda: np.copyto(block, other), block.nbytes),
        ("synced_write", write, 8 * block.nbytes),
    ):
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            act()
            best = min(best, time.perf_counter() - start)
        rates[f"{name}_gb_per_s"] = nbytes / best / 1e9
    (folder / "written").unlink()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--mergekit", help="mergekit's command mergekit-yaml, in an environment of its own")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--large", action="store_true", help="also the memory of a checkpoint four times as large")
    options = parser.parse_args()
    generate(options.folder / "small", "small")
    for file in (options.folder / "small").glob("*/*.safetensors"):
        file.read_bytes()  # into the disk's cache
    found: dict[str, Any] = {
        "command": "python -m benchmarks.merge_speed --folder DIR --mergekit MERGEKIT_YAML --methods "
        + " ".join([*options.methods, *["--large"] * options.large]),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
        "parameters": sum(int(np.prod(shape)) for _, shape in shapes("small")),
        "methods": {},
    }
    for method in options.methods:
        path, out = recipe(options.folder / "small", method), options.folder / "out"
        commands = {"ours": [sys.executable, "-m", "merge", str(path), str(out)]}
        if options.mergekit and method not in OURS_ONLY:
            commands["mergekit"] = [options.mergekit, str(path), str(out), "--lazy-unpickle"]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                runs[name].append(timed(command, out))
                print(method, name, {key: round(value, 2) for key, value in runs[name][-1].items()}, flush=True)
        row: dict[str, Any] = dict(runs)
        if "mergekit" in runs:
            pairs = zip(runs["mergekit"], runs["ours"], strict=True)
            row["times_faster"] = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
        found["methods"][method] = row
    if options.large:
        generate(options.folder / "large", "large")
        found["large"] = {"parameters": sum(int(np.prod(shape)) for _, shape in shapes("large"))}
        for method in ("linear", "ties", "rankmean"):
            path, out = recipe(options.folder / "large", method), options.folder / "out"
            found["large"][method] = run = timed([sys.executable, "-m", "merge", str(path), str(out)], out)
            small = max(each["peak_gb"] for each in found["methods"].get(method, {}).get("ours", [run]))
            run["peak_over_small"] = run["peak_gb"] / small
            print("large", method, run, flush=True)
    rates = floor(options.folder / "small")
    weights = 2 * found["parameters"] / 1e9
    found["floor"] = {
        **rates,
        "note": "seconds that reading two or three models from the disk's cache and a synced write of one take at least, "
        "one after the other and, where the disk is waited for, beside each other",
        "linear_seconds": max(2 * weights / rates["cached_read_gb_per_s"], weights / rates["synced_write_gb_per_s"]),
        "with_base_seconds": max(3 * weights / rates["cached_read_gb_per_s"], weights / rates["synced_write_gb_per_s"]),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["floor"], indent=1))


if __name__ == "__main__":
    main()
