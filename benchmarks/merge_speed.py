"""Time and memory of ``python -m merge`` against mergekit: a bfloat16 base of 1.1 billion parameters and two tuned models.

    python -m benchmarks.merge_speed --folder DIR [--mergekit MERGEKIT_YAML] [--rounds 1] [--methods linear ties ...]

DIR holds the generated checkpoints (6.6 GB, generated once) and the output of the current run. MERGEKIT_YAML is mergekit's
command mergekit-yaml in a separate environment; without MERGEKIT_YAML only our command is timed. Every run is a new process.
Its inputs are in the page cache, and all dirty pages are synced before it starts. Our seconds include the sync of the output
to disk; mergekit does not sync, and its seconds exclude the sync. Peak memory is anonymous memory, without mapped files.

``--large`` also merges a checkpoint four times as large (4.4 billion parameters, 27 GB of disk): the peak memory must not grow
with the size of the model. Writes benchmarks/results/merge_speed.json.
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
from dsee_jax.runtime import files

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
    """Return the content of config.json."""
    layers, width, hidden, vocabulary, heads, kv_heads = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": hidden,
        "vocab_size": vocabulary,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def shapes(size: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of the model."""
    layers, width, hidden, vocabulary, heads, kv_heads = SHAPES[size]
    inner = width // heads * kv_heads
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
    """Write a base of random weights and two models tuned from this base, 3 shards each; existing models are kept."""
    shape_of = dict(shapes(size))
    nbytes = {name: 2 * int(np.prod(shape)) for name, shape in shape_of.items()}
    total = sum(nbytes.values())
    shards = tensors.shards(nbytes, max_shard_size=total * 2 // 5)
    for number, model in enumerate(("base", "model_a", "model_b")):
        out = folder / model
        if (out / "config.json").exists():
            continue
        out.mkdir(parents=True, exist_ok=True)
        for file, names in shards.items():
            tensors.write(out, {name: _weights(name, shape_of[name], number) for name in names})
            (out / tensors.SINGLE).replace(out / file)
        (out / tensors.INDEX).write_text(tensors.index_text(shards, total))
        # Last: config.json marks the model as complete.
        (out / "config.json").write_text(json.dumps(config(size), indent=1))


def _weights(name: str, shape: tuple[int, ...], model: int) -> np.ndarray:
    seed = [ord(letter) for letter in name]
    weights = _normal(seed, shape) * np.float32(0.02)
    if model:
        # Changes by tuning are small against the weights and differ between layers.
        scale = np.random.default_rng([*seed, model]).uniform(0.5, 2)
        weights += _normal([*seed, model], shape) * np.float32(2e-4 * scale)
    return weights.astype(ml_dtypes.bfloat16)


def _normal(seed: list[int], shape: tuple[int, ...]) -> np.ndarray:
    """Return normal numbers. A large tensor repeats its numbers: drawing every number would take longer than all merges."""
    return np.resize(np.random.default_rng(seed).standard_normal(1 << 22, np.float32), shape)


def recipe(folder: Path, method: str) -> Path:
    """Write the recipe in mergekit's grammar and return its path."""
    models = [
        {"model": str(folder / name), "parameters": {"weight": weight, **METHODS[method]}}
        for name, weight in (("model_a", 0.4), ("model_b", 0.6))
    ]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        content["base_model"] = str(folder / "base")
    if method == "slerp":
        content |= {"base_model": str(folder / "model_a"), "parameters": {"t": 0.4}}
    if method in ("slerp", "rankmean"):
        for model in models:
            del model["parameters"]
    path = folder / f"{method}.yml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def timed(command: list[str], out: Path) -> dict[str, float]:
    """Run a command that writes ``out``; return its seconds, its seconds with a final sync, and its peak memory in GB."""
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
    """Return rates of this machine in GB/s: reads from the page cache, copies in memory, and synced writes."""
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
    parser.add_argument("--mergekit", help="mergekit's command mergekit-yaml, in a separate environment")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--large", action="store_true", help="also merge a checkpoint four times as large")
    options = parser.parse_args()
    generate(options.folder / "small", "small")
    for file in (options.folder / "small").glob("*/*.safetensors"):
        file.read_bytes()  # fills the page cache
    report: dict[str, Any] = {
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
        report["methods"][method] = row
    if options.large:
        generate(options.folder / "large", "large")
        large: dict[str, Any] = {"parameters": sum(int(np.prod(shape)) for _, shape in shapes("large"))}
        report["large"] = large
        for method in ("linear", "ties", "rankmean"):
            path, out = recipe(options.folder / "large", method), options.folder / "out"
            large[method] = run = timed([sys.executable, "-m", "merge", str(path), str(out)], out)
            small = max(each["peak_gb"] for each in report["methods"].get(method, {}).get("ours", [run]))
            run["peak_over_small"] = run["peak_gb"] / small
            print("large", method, run, flush=True)
    rates = floor(options.folder / "small")
    weights = 2 * report["parameters"] / 1e9
    report["floor"] = {
        **rates,
        "note": "lower bounds in seconds: two or three models are read from the page cache while one model is written "
        "and synced",
        "linear_seconds": max(2 * weights / rates["cached_read_gb_per_s"], weights / rates["synced_write_gb_per_s"]),
        "with_base_seconds": max(3 * weights / rates["cached_read_gb_per_s"], weights / rates["synced_write_gb_per_s"]),
    }
    files.write(RESULTS, report)
    print(json.dumps(report["floor"], indent=1))


if __name__ == "__main__":
    main()
