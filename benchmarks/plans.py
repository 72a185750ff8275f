"""What training runs would take of TPUs that are not here: `dsee_jax.plan` of real models, one resumable command.

    pip install '.[tpu,plot]'
    python -m benchmarks.plans [--only NAME ...]

Each plan compiles the real steps of DSEE tuning (r 16, 64 nonzeros, query and value), that which trains and that which
evaluates, in a process of its own; the table is of the former. ``bert``, ``roberta``, ``13b_64``, ``13b_256``, ``70b`` are of
those models; ``weak_N`` and ``strong_N`` take the 13 B model to N chips of v5e, a row of 2048 tokens for each chip or 256 rows
in all, weights divided over all chips. ``merge`` is RankMean of two 13 B models, all in memory, planned by ``python -m merge``
from headers alone (files with holes for the weights).

What a plan said is kept, with what was asked, in ``benchmarks/results/plans/NAME.json`` and not compiled again unless that
changes. Writes ``benchmarks/results/plans.md`` and ``plans.png`` (with matplotlib) of all there are.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.glue import RESULTS, ROOT
from dsee_jax.ckpt import hf_names, tensors
from dsee_jax.models import llama
from dsee_jax.plan.roofline import CHIPS
from dsee_jax.runtime import files

FOLDER = RESULTS / "plans"
MODELS: dict[str, dict[str, Any]] = {
    "BERT-base": {
        "model_type": "bert",
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "RoBERTa-large": {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "Llama-2-13B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "Llama-2-70B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}
"""The published config.json of each, what matters to shapes."""
ENCODER = {"dtype": "bfloat16"}
DECODER = {"task": "causal-lm", "dtype": "bfloat16", "param_dtype": "bfloat16", "scan": True, "remat": True}


def plan(model: str, topology: str, rows: int, length: int, **mesh: int) -> dict[str, Any]:
    """Return what one plan asks for."""
    return {"model": model, "topology": topology, "rows": rows, "length": length, "mesh": mesh}


PLANS = {
    "bert": plan("BERT-base", "v5e:4x4", 512, 128, data=16),
    "roberta": plan("RoBERTa-large", "v5e:4x4", 512, 128, data=16),
    "13b_64": plan("Llama-2-13B", "v5e:8x8", 64, 2048, data=1, fsdp=64),
    "13b_256": plan("Llama-2-13B", "v5e:16x16", 256, 2048, data=4, fsdp=64),
    "70b": plan("Llama-2-70B", "v6e:16x16", 256, 2048, data=1, fsdp=256),
}
GROWTH = {4: "v5e:2x2", 16: "v5e:4x4", 64: "v5e:8x8", 256: "v5e:16x16"}
PLANS |= {f"weak_{n}": plan("Llama-2-13B", where, n, 2048, data=1, fsdp=n) for n, where in GROWTH.items()}
PLANS["merge"] = {"model": "Llama-2-13B", "topology": "v5e:4x4", "merge": "rankmean", "models": 2}
PLANS |= {f"strong_{n}": plan("Llama-2-13B", where, 256, 2048, data=1, fsdp=n) for n, where in GROWTH.items()}


def made(name: str) -> dict[str, Any]:
    """Return a plan, compiled in a process of its own unless it is kept."""
    asked, kept = PLANS[name], FOLDER / f"{name}.json"
    if kept.exists() and (found := json.loads(kept.read_text()))["asked"] == asked:
        return found["plan"]
    print(f"== {name}: {asked['model']} on {asked['topology']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        command = merging(place, asked) if "merge" in asked else tuning(place, asked)
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        subprocess.run(
            [sys.executable, "-m", *command, "--topology", asked["topology"], "--json", str(place / "plan.json")],
            check=True,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        found = json.loads((place / "plan.json").read_text())
    FOLDER.mkdir(parents=True, exist_ok=True)
    files.write(kept, {"asked": asked, "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})", "plan": found})
    return found


def tuning(place: Path, asked: dict[str, Any]) -> list[str]:
    """Return the command that plans a tuning; its config is written below ``place``."""
    (place / "config.json").write_text(json.dumps(MODELS[asked["model"]]))
    decoder = MODELS[asked["model"]]["model_type"] == "llama"
    config = {
        "model": {"path": str(place), **(DECODER if decoder else ENCODER)},
        "data": {"max_length": asked["length"], **({"source": "jsonl", "dir": str(place)} if decoder else {})},
        "delta": {"targets": [".*/attention/(query|value)/kernel"], "rank": 16, "nonzeros": 64},
        "train": {"batch_size": asked["rows"]},
        "mesh": asked["mesh"],
    }
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    return ["dsee_jax", "plan", str(place / "run.yaml")]


def merging(place: Path, asked: dict[str, Any]) -> list[str]:
    """Return the command that plans a merge; its recipe and models, holes for their weights, are written below ``place``."""
    config = MODELS[asked["model"]] | {"architectures": ["LlamaForCausalLM"]}
    shapes = hf_names.stored_shapes(llama.Model(llama.Config.from_hf(config)))
    begin, _, size = tensors.header({name: ("BF16", shape) for name, shape in shapes.items()})
    names = ["base", *(f"tuned_{number}" for number in range(asked["models"]))]
    for name in names:
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))
        with (place / name / tensors.SINGLE).open("wb") as file:
            file.write(begin)
            file.truncate(size)
    recipe = {"merge_method": asked["merge"], "base_model": "base", "models": [{"model": name} for name in names[1:]]}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["merge", str(place / "recipe.yaml"), str(place / "merged"), "--plan"]


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "| plan | chips | batch | GB a chip | fits | sent by a chip | largest reduced | roofline, bound | compiled in |",
        "|" + "---|" * 9,
    ]
    for name, one in found.items():
        batch = f"{one['rows']} x {one['length']}" if "rows" in one else f"{PLANS[name]['models']} models"
        cells = [f"{name}: {PLANS[name]['model']}", one["topology"], batch]
        cells += [
            f"{one['bytes_per_chip']['total'] / 1e9:.2f} of {one['memory'] / 1e9:.1f}",
            "yes" if one["fits"] else "no",
        ]
        if "roofline" in one:
            reduced = [row for row in one["collectives"] if row["kind"] in ("all-reduce", "reduce-scatter")]
            largest = max(reduced, key=lambda row: row["bytes"] / row["count"], default={"shape": "nothing"})
            roofline = one["roofline"]
            cells += [f"{one['sent_bytes_per_chip'] / 1e9:.3g} GB", largest["shape"]]
            cells += [
                f"{1e3 * roofline['step_seconds']:.3g} ms, {roofline['bound']}",
                f"{one['compile_seconds']:.0f} s",
            ]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(found: dict[str, dict[str, Any]]) -> None:
    """Draw how memory and what is sent grow with the chips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind, label in (("weak", "a row for each chip"), ("strong", "256 rows in all")):
        plans = {n: found[f"{kind}_{n}"] for n in GROWTH if f"{kind}_{n}" in found}
        axes[0].plot(list(plans), [one["bytes_per_chip"]["total"] / 1e9 for one in plans.values()], "o-", label=label)
        fit = {n: one["sent_bytes_per_chip"] / 1e9 for n, one in plans.items() if one["fits"]}
        axes[1].plot(list(fit), list(fit.values()), "o-", label=label)
    axes[0].axhline(CHIPS["v5e"].memory / 1e9, color="0.6", linestyle="--", label="memory of a v5e")
    axes[0].set(yscale="log", title="memory of a chip, GB")
    axes[0].set_yticks([3, 5, 10, 20, 50, 100], ["3", "5", "10", "20", "50", "100"], minor=False)
    axes[0].minorticks_off()
    axes[1].set(ylim=(0, None), title="sent by a chip in a step, GB (plans that fit)")
    for axis in axes:
        axis.set(xscale="log", xlabel="chips")
        axis.set_xticks(list(GROWTH), [str(n) for n in GROWTH])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(RESULTS / "plans.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PLANS, default=list(PLANS), help="plans to compile; the default is all"
    )
    options = parser.parse_args()
    for name in options.only:
        made(name)
    found = {name: made(name) for name in PLANS if (FOLDER / f"{name}.json").exists()}
    files.write_text(RESULTS / "plans.md", markdown(found))
    if any(name.startswith(("weak", "strong")) for name in found):
        picture(found)
    print(markdown(found))


if __name__ == "__main__":
    main()
