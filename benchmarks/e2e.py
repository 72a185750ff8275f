"""DSEE on decoders that learn to write, from the E2E challenge's data: one resumable command.

    python -m benchmarks.e2e --data E2E_DIR [--llama LLAMA_DIR] [--section.key=value ...]

E2E_DIR holds devset.csv, which is trained on, and testset_w_refs.csv, which is scored on. Two models: a GPT-2 of random
weights (``benchmarks.random_gpt2``) that is first tuned in full (``configs/gpt2_e2e_full.yaml``) and then by DSEE
(``configs/gpt2_e2e_dsee.yaml``), and with ``--llama`` a real Llama (``configs/stories_e2e_dsee.yaml``). Of each by DSEE:
nothing pruned, 30 % and 50 % of the weights zero, and a quarter of the heads and neurons of each layer cut out; as many
epochs in all.
What a run measured is kept, with its config, in ``RESULTS/e2e/RUN.json`` and not measured again unless the config changes; a
run that was interrupted goes on. Overrides apply to every run, for instance ``--data.examples=200`` for a quick look.

Writes the table to ``RESULTS/e2e.json`` and ``e2e.md``, of the runs there are so far: loss and perplexity a token of the
references, BLEU, NIST and ROUGE-L of greedy texts, the bytes of model and adapter, and the tokens a second of written texts
(``--prompts`` of them, in batches of ``generate.batch_size``; the finished models write in turns, programs compiled).
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
from benchmarks.glue import RESULTS, ROOT, equal
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
    """Do one run, or what is left of it, in a process of its own; return its metrics.json, and its speed of writing."""
    out, kept = options.runs / name, options.results / "e2e" / f"{name}.json"
    overrides = (*overrides, *options.overrides)
    asked = yaml.safe_load(config_file.dump(config_file.read(config, overrides)))
    # Where the files lie does not change what is measured.
    del asked["output_dir"], asked["data"]["dir"], asked["model"]["path"]
    if kept.exists() and equal((found := json.loads(kept.read_text()))["config"], asked):
        return found["metrics"]
    print(f"== {name}", flush=True)
    places = (f"--model.path={model}", f"--data.dir={options.data}", f"--output_dir={out}")
    environment = {"JAX_COMPILATION_CACHE_DIR": str(options.runs / "compiled"), **os.environ}
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(config), *places, *overrides],
        check=True,
        env=environment,
        cwd=ROOT,
    )
    found = json.loads((out / "metrics.json").read_text())
    kept.parent.mkdir(parents=True, exist_ok=True)
    files.write(kept, {"config": asked, "metrics": found})
    return found


def speeds(runs: Sequence[Path], prompts: int) -> dict[str, float]:
    """Return for each finished run the tokens a second of the texts that it writes for its first prompts.

    All programs are compiled first; then the runs write in turns, `ROUNDS` times; the median.
    """
    from dsee_jax.ckpt import folders
    from dsee_jax.generation import pipeline, texts
    from dsee_jax.train import inputs

    def writer(run: Path) -> Callable[[], float]:
        config = config_file.read(run / folders.CONFIG, [f"--generate.prompts={prompts}"])
        found = pipeline.opened(run, dtype=config.model.dtype)
        exercise = inputs.read_data(config, inputs.read_task(config), run / "model", found.model).exercise
        assert exercise is not None, "generate.new_tokens is 0"

        def write() -> float:
            begin = time.perf_counter()
            written = texts.texts(
                *(found.model, found.params, exercise.tokenizer, exercise.prompts),
                ends=exercise.ends,
                pad=exercise.pad,
                batch_size=config.generate.batch_size,
                updates=found.updates,
                new_tokens=config.generate.new_tokens,
            )
            seconds = time.perf_counter() - begin
            return (
                sum(len(exercise.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written) / seconds
            )

        write()
        return write

    writers = {run.name: writer(run) for run in runs}
    rounds = [{name: write() for name, write in writers.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(one[name] for one in rounds) for name in writers}


def row(model: str, method: str, found: dict[str, Any], stage: str = "final") -> dict[str, Any]:
    """Return one line of the table: the final figures of a run, or with stage before those of what it began with."""
    figures = {name: found[name] for name in ("weight_sparsity", "flops_ratio", "model_bytes")}
    return {"model": model, "method": method, "metrics": found[stage], **(figures if stage == "final" else {})}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table for the README."""
    lines = [
        "| model | method | loss | perplexity | BLEU | NIST | ROUGE-L | weights zero or gone | FLOPs a token | bytes "
        "| written, tokens/s |",
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
    parser.add_argument("--prompts", type=int, default=128, help="how many texts to write for the speed; default 128")
    parser.add_argument(
        "--speeds", action="store_true", help="measure how fast they write again, with nothing beside it"
    )
    options, options.overrides = parser.parse_known_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    start = options.runs / "random_gpt2"
    if not (start / "model.safetensors").exists():
        random_gpt2.write(start, options.data / "devset.csv")
    rows: list[dict[str, Any]] = []
    named: dict[str, dict[str, Any]] = {}

    def add(name: str, *new: dict[str, Any]) -> None:
        rows.extend(new)
        named[name] = new[-1]
        keep()

    def keep() -> None:
        found = {
            "command": " ".join(["python -m benchmarks.e2e --data E2E_DIR --llama LLAMA_DIR", *options.overrides]),
            "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), no accelerator",
            "rows": rows,
        }
        files.write(options.results / "e2e.json", found)
        files.write_text(options.results / "e2e.md", markdown(rows))

    full = run("gpt2_full", FULL, start, options)
    first = row("GPT-2 shape", "random weights", full, "before")
    add("gpt2_full", first, row("GPT-2 shape", "every weight tuned", full))
    plans = [("GPT-2 shape", "gpt2", GPT2, options.runs / "gpt2_full" / "model")]
    if options.llama:
        plans.append(("stories260k", "stories", LLAMA, options.llama))
    for label, short, config, model in plans:
        train = config_file.read(config).train
        for pruned, overrides in PRUNINGS.items():
            epochs = [f"--train.epochs={train.epochs + train.retune_epochs}"] if pruned == "nothing" else []
            name = f"{short}_dsee_{FILES[pruned]}"
            found = run(name, config, model, options, *overrides, *epochs)
            before = [row(label, "pretrained", found, "before")] if pruned == "nothing" and short == "stories" else []
            add(name, *before, row(label, f"DSEE, pruned: {pruned}", found))
    kept = options.results / "e2e" / "speeds.json"
    asked = {"runs": list(named), "prompts": options.prompts, "overrides": options.overrides}
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if options.speeds or found.get("asked") != asked:
        found = {"asked": asked, "speeds": speeds([options.runs / name for name in named], options.prompts)}
        files.write(kept, found)
    for name, speed in found["speeds"].items():
        named[name]["written_tokens_per_second"] = speed
    keep()
    print(markdown(rows))


if __name__ == "__main__":
    main()
