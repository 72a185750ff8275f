"""Compare the time of our training step with PEFT's: alternating runs in separate processes, and the ratio of the medians.

``python -m benchmarks.compare_steps --model HF_DIR [--rounds 5]`` writes ``benchmarks/results/train_step.json``.

The runs alternate because the speed of a machine drifts. The ratio of a round compares two consecutive runs.
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import statistics
import subprocess
import sys

from dsee_jax.runtime import files


def seconds(module: str, python: str, options: list[str]) -> list[float]:
    """Return the seconds of each step, which ``python -m module`` prints one per line."""
    command = [python, "-m", module, *options, "--seconds-only"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


def cpu() -> str:
    """Return the name of the processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", required=True, help="a Hugging Face folder, for instance from benchmarks.random_bert"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, help="Python interpreter with the extra `bench`")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results/train_step.json")
    arguments = parser.parse_args()
    options = [f"--{name}={getattr(arguments, name)}" for name in ("model", "batch", "length", "steps")]

    ours: list[list[float]] = []
    peft: list[list[float]] = []
    for number in range(arguments.rounds):
        for module, runs in (("benchmarks.train_step", ours), ("benchmarks.peft_step", peft)):
            runs.append(seconds(module, arguments.python, options))
        pair = [statistics.median(runs[-1]) for runs in (ours, peft)]
        print(
            f"round {number + 1}: ours {pair[0]:.3f} s, PEFT {pair[1]:.3f} s, ratio {pair[0] / pair[1]:.3f}", flush=True
        )

    ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(ours, peft, strict=True)]
    result = {
        "command": f"python -m benchmarks.compare_steps {' '.join(options)} --rounds={arguments.rounds}",
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "ratio_of_fastest": min(map(min, ours)) / min(map(min, peft)),
        "ours_seconds": ours,
        "peft_seconds": peft,
        "machine": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "peft", "transformers")
        },
    }
    result["command"] = result["command"].replace(arguments.model, "HF_DIR")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    files.write(arguments.out, result)
    print(f"median ratio {result['ratio_median']:.3f}; wrote {arguments.out}")


if __name__ == "__main__":
    main()
