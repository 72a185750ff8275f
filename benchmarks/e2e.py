"""DSEE of decoders on the data of the E2E challenge (descriptions of restaurants); the command is resumable.

    python -m benchmarks.e2e --data E2E_DIR [--llama LLAMA_DIR] [--section.key=value ...]

E2E_DIR holds the training set devset.csv and the scored set testset_w_refs.csv. There are two models: a GPT-2 of random
weights (``benchmarks.random_gpt2``), tuned in full (``configs/gpt2_e2e_full.yaml``) and then by DSEE
(``configs/gpt2_e2e_dsee.yaml``), and with ``--llama`` a pretrained Llama (``configs/stories_e2e_dsee.yaml``). DSEE runs four
times on each model: without pruning, with 30 % and 50 % of the weights at zero, and without a quarter of the heads and neurons
of each layer. All four runs have the same number of epochs.

The metrics and the config of a run are stored in ``RESULTS/e2e/RUN.json``; the run is repeated only if the config changes. An
interrupted run resumes. Overrides apply to every run, for instance ``--data.examples=200`` for a quick test.

Writes the table to ``RESULTS/e2e.json`` and ``e2e.md`` after every run: loss and perplexity per token of the references, BLEU,
NIST and ROUGE-L of greedily generated texts, the bytes of model and adapter, and the generated tokens per second (texts for
``--prompts`` prompts in batches of ``generate.batch_size``; the finished models alternate, programs are compiled before).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import random_gpt2
from benchmarks.runs import RESULTS, ROOT, equal
from dsee_jax.runtime import files
from dsee_jax.train import config_file

FULL, GPT2, LLAMA = (
    ROOT / "configs" / f"{name}.yaml" for name in ("gpt2_e2e_full", "gpt2_e2e_dsee", "stories_e2e_dsee")
)
PRUNINGS: dict[str, tuple[str, ...]] = {
    "nothing": ("--prune.kind=none",),
    "30 % of weights": ("--prune.sparsity=0.3",),
    "50 % of weights": ("--prune.sparsity=0.5",),
    "a quarter of heads and neurons": (
        *("--prune.kind=structured", "--prune.scope=tensor", "--prune.heads=0.25", "--prune.neurons=0.25"),
    ),
}
ROUNDS = 3
FILES = {"nothing": "0", "30 % of weights": "30", "50 % of weights": "50", "a quarter of heads and neurons": "cut"}


def run(name: str, config: Path, model: Path, options: argparse.Namespace, *overrides: str) -> dict[str, Any]:
    """Do the remaining part of a run in a new process; return the content of its metrics.json."""
    out, stored = options.runs / name, options.results / "e2e" / f"{name}.json"
    overrides = (*overrides, *options.overrides)
    resolved = yaml.safe_load(config_file.dump(config_file.read(config, overrides)))
    # The places of the files do not change the metrics.
    del resolved["output_dir"], resolved["data"]["dir"], resolved["model"]["path"]
    if stored.exists() and equal((before := json.loads(stored.read_text()))["config"], resolved):
        return before["metrics"]
    print(f"== {name}", flush=True)
    places = (f"--model.path={model}", f"--data.dir={options.data}", f"--output_dir={out}")
    environment = {"JAX_COMPILATION_CACHE_DIR": str(options.runs / "compiled"), **os.environ}
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(config), *places, *overrides],
        check=True,
        env=environment,
        cwd=ROOT,
    )
    metrics = json.loads((out / "metrics.json").read_text())
    stored.parent.mkdir(parents=True, exist_ok=True)
    files.write(stored, {"config": resolved, "metrics": metrics})
    return metrics


def speeds(runs: Sequence[Path], prompts: int) -> dict[str, float]:
    """Return the generated tokens per second of each finished run, for its first ``prompts`` prompts.

    All programs are compiled first. Then the runs alternate `ROUNDS` times; the result is the median.
    """
    from dsee_jax.ckpt import folders
    from dsee_jax.generation import pipeline, texts
    from dsee_jax.train import inputs

    def writer(run: Path) -> Callable[[], float]:
        config = config_file.read(run / folders.CONFIG, [f"--generate.prompts={prompts}"])
        decoder = pipeline.load(run, dtype=config.model.dtype)
        references = inputs.read_data(config, inputs.read_task(config), run / "model", decoder.model).references
        assert references is not None, "generate.new_tokens is 0"

        def write() -> float:
            begin = time.perf_counter()
            generated = texts.generate(
                decoder,
                references.prompts,
                batch_size=config.generate.batch_size,
                new_tokens=config.generate.new_tokens,
            )
            seconds = time.perf_counter() - begin
            tokens = sum(len(decoder.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in generated)
            return tokens / seconds

        write()
        return write

    writers = {run.name: writer(run) for run in runs}
    rounds = [{name: write() for name, write in writers.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(speeds[name] for speeds in rounds) for name in writers}


def row(model: str, method: str, content: dict[str, Any], stage: str = "final") -> dict[str, Any]:
    """Return one row of the table from a metrics.json: ``stage`` is "final", or "before" for the metrics of the start."""
    figures = {name: content[name] for name in ("weight_sparsity", "flops_ratio", "model_bytes")}
    return {"model": model, "method": method, "metrics": content[stage], **(figures if stage == "final" else {})}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| model | method | loss | perplexity | BLEU | NIST | ROUGE-L | zero or removed weights | FLOPs per token | bytes "
        "| generated tokens/s |",
        "|" + "---|" * 11,
    ]
    for r in rows:
        m = r["metrics"]
        cells = [
            f"{m['loss']:.3f}",
            f"{m['perplexity']:.2f}",
            f"{m['bleu']:.1f}",
            f"{m['nist']:.2f}",
            f"{m['rouge_l']:.3f}",
        ]
        if "model_bytes" in r:
            cells += [f"{r['weight_sparsity']:.0%}", f"{r['flops_ratio']:.0%}", f"{r['model_bytes'] / 1e6:.2f} MB"]
            cells += [f"{r['written_tokens_per_second']:,.0f}" if "written_tokens_per_second" in r else ""]
        else:
            cells += [""] * 4
        lines.append(f"| {r['model']} | {r['method']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def absolute(text: str) -> Path:
    return Path(text).absolute()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=absolute, required=True, metavar="E2E_DIR")
    parser.add_argument("--llama", type=absolute, metavar="LLAMA_DIR", help="a small Llama in Hugging Face's layout")
    parser.add_argument("--runs", type=absolute, default=ROOT / "runs" / "e2e")
    parser.add_argument("--results", type=absolute, default=RESULTS)
    parser.add_argument("--prompts", type=int, default=128, help="prompts for the generation speed; default 128")
    parser.add_argument(
        "--speeds", action="store_true", help="measure the generation speed again; the machine must be idle"
    )
    options, options.overrides = parser.parse_known_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    start = options.runs / "random_gpt2"
    if not (start / "model.safetensors").exists():
        random_gpt2.write(start, options.data / "devset.csv")
    rows: list[dict[str, Any]] = []
    row_of: dict[str, dict[str, Any]] = {}

    def add(name: str, *new: dict[str, Any]) -> None:
        rows.extend(new)
        row_of[name] = new[-1]
        save()

    def save() -> None:
        report = {
            "command": " ".join(["python -m benchmarks.e2e --data E2E_DIR --llama LLAMA_DIR", *options.overrides]),
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
            "rows": rows,
        }
        files.write(options.results / "e2e.json", report)
        files.write_text(options.results / "e2e.md", markdown(rows))

    full = run("gpt2_full", FULL, start, options)
    first = row("GPT-2 shape", "random weights", full, "before")
    add("gpt2_full", first, row("GPT-2 shape", "every weight tuned", full))
    starts = [("GPT-2 shape", "gpt2", GPT2, options.runs / "gpt2_full" / "model")]
    if options.llama:
        starts.append(("stories260k", "stories", LLAMA, options.llama))
    for label, short, config, model in starts:
        train = config_file.read(config).train
        for pruned, overrides in PRUNINGS.items():
            epochs = [f"--train.epochs={train.epochs + train.retune_epochs}"] if pruned == "nothing" else []
            name = f"{short}_dsee_{FILES[pruned]}"
            result = run(name, config, model, options, *overrides, *epochs)
            before = [row(label, "pretrained", result, "before")] if pruned == "nothing" and short == "stories" else []
            add(name, *before, row(label, f"DSEE, pruned: {pruned}", result))
    stored = options.results / "e2e" / "speeds.json"
    request = {"runs": list(row_of), "prompts": options.prompts, "overrides": options.overrides}
    measured = json.loads(stored.read_text()) if stored.exists() else {}
    if options.speeds or measured.get("asked") != request:
        measured = {"asked": request, "speeds": speeds([options.runs / name for name in row_of], options.prompts)}
        files.write(stored, measured)
    for name, speed in measured["speeds"].items():
        row_of[name]["written_tokens_per_second"] = speed
    save()
    print(markdown(rows))


if __name__ == "__main__":
    main()
