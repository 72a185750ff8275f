"""Memory, traffic and step time of training runs on TPUs you do not have: `dsee_jax.plan` of published models; resumable.

    pip install '.[tpu,plot]'
    python -m benchmarks.plans [--only NAME ...]

Each plan is a new process, which compiles the training step and the evaluation step of DSEE tuning (r 16, 64 nonzeros, query
and value); the table shows the training step. ``bert``, ``roberta``, ``13b_64``, ``13b_256`` and ``70b`` plan the models of
these names. ``weak_N`` and ``strong_N`` plan the 13 B model on N chips of v5e with the weights sharded over all chips: weak
scaling has one row of 2048 tokens per chip, strong scaling 256 rows in total. ``merge`` plans RankMean of two 13 B models in
memory by ``python -m merge``, which reads only headers (the weight files are sparse).

The settings and the result of a plan are stored in ``benchmarks/results/plans/NAME.json``; a plan is compiled again only if
its settings change. Writes ``benchmarks/results/plans.md`` and ``plans.png`` (with matplotlib) from all stored plans.
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

from benchmarks.runs import RESULTS, ROOT
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
"""Name -> the fields of the published config.json that decide shapes."""
ENCODER = {"dtype": "bfloat16"}
DECODER = {"task": "causal-lm", "dtype": "bfloat16", "param_dtype": "bfloat16", "scan": True, "remat": True}


def plan(model: str, topology: str, rows: int, length: int, **mesh: int) -> dict[str, Any]:
    """Return the settings of one plan of a training run."""
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


def compiled(name: str) -> dict[str, Any]:
    """Return the result of a plan: the stored one, or else compiled in a new process."""
    settings, path = PLANS[name], FOLDER / f"{name}.json"
    if path.exists() and (stored := json.loads(path.read_text()))["asked"] == settings:
        return stored["plan"]
    print(f"== {name}: {settings['model']} on {settings['topology']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        command = merging(place, settings) if "merge" in settings else tuning(place, settings)
        environment = dict(os.environ, JAX_PLATFORMS="cpu")
        subprocess.run(
            [sys.executable, "-m", *command, "--topology", settings["topology"], "--json", str(place / "plan.json")],
            check=True,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
        )
        result = json.loads((place / "plan.json").read_text())
    FOLDER.mkdir(parents=True, exist_ok=True)
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    files.write(path, {"asked": settings, "machine": machine, "plan": result})
    return result


def tuning(place: Path, settings: dict[str, Any]) -> list[str]:
    """Return the command that plans a tuning; writes its config in ``place``."""
    (place / "config.json").write_text(json.dumps(MODELS[settings["model"]]))
    decoder = MODELS[settings["model"]]["model_type"] == "llama"
    config = {
        "model": {"path": str(place), **(DECODER if decoder else ENCODER)},
        "data": {"max_length": settings["length"], **({"source": "jsonl", "dir": str(place)} if decoder else {})},
        "delta": {"targets": [".*/attention/(query|value)/kernel"], "rank": 16, "nonzeros": 64},
        "train": {"batch_size": settings["rows"]},
        "mesh": settings["mesh"],
    }
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    return ["dsee_jax", "plan", str(place / "run.yaml")]


def merging(place: Path, settings: dict[str, Any]) -> list[str]:
    """Return the command that plans a merge; writes its recipe and its models, with sparse weight files, in ``place``."""
    config = MODELS[settings["model"]] | {"architectures": ["LlamaForCausalLM"]}
    shapes = hf_names.stored_shapes(llama.Llama(llama.Config.from_hf(config)))
    begin, _, size = tensors.header({name: ("BF16", shape) for name, shape in shapes.items()})
    names = ["base", *(f"tuned_{number}" for number in range(settings["models"]))]
    for name in names:
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(config))
        with (place / name / tensors.SINGLE).open("wb") as file:
            file.write(begin)
            file.truncate(size)
    recipe = {
        "merge_method": settings["merge"],
        "base_model": "base",
        "models": [{"model": name} for name in names[1:]],
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["merge", str(place / "recipe.yaml"), str(place / "merged"), "--plan"]


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of all plans."""
    lines = [
        "| plan | chips | batch | GB per chip | fits | sent per chip | largest reduction | roofline, bound | compile time |",
        "|" + "---|" * 9,
    ]
    for name, result in results.items():
        batch = f"{result['rows']} x {result['length']}" if "rows" in result else f"{PLANS[name]['models']} models"
        cells = [f"{name}: {PLANS[name]['model']}", result["topology"], batch]
        cells += [
            f"{result['bytes_per_chip']['total'] / 1e9:.2f} of {result['memory'] / 1e9:.1f}",
            "yes" if result["fits"] else "no",
        ]
        if "roofline" in result:
            reduced = [row for row in result["collectives"] if row["kind"] in ("all-reduce", "reduce-scatter")]
            largest = max(reduced, key=lambda row: row["bytes"] / row["count"], default={"shape": "nothing"})
            roofline = result["roofline"]
            cells += [f"{result['sent_bytes_per_chip'] / 1e9:.3g} GB", largest["shape"]]
            cells += [
                f"{1e3 * roofline['step_seconds']:.3g} ms, {roofline['bound']}",
                f"{result['compile_seconds']:.0f} s",
            ]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(results: dict[str, dict[str, Any]]) -> None:
    """Draw the memory and the sent bytes per chip against the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind, label in (("weak", "one row per chip"), ("strong", "256 rows in total")):
        plans = {n: results[f"{kind}_{n}"] for n in GROWTH if f"{kind}_{n}" in results}
        axes[0].plot(list(plans), [plan["bytes_per_chip"]["total"] / 1e9 for plan in plans.values()], "o-", label=label)
        fit = {n: plan["sent_bytes_per_chip"] / 1e9 for n, plan in plans.items() if plan["fits"]}
        axes[1].plot(list(fit), list(fit.values()), "o-", label=label)
    axes[0].axhline(CHIPS["v5e"].memory / 1e9, color="0.6", linestyle="--", label="memory of a v5e")
    axes[0].set(yscale="log", title="memory per chip, GB")
    axes[0].set_yticks([3, 5, 10, 20, 50, 100], ["3", "5", "10", "20", "50", "100"], minor=False)
    axes[0].minorticks_off()
    axes[1].set(ylim=(0, None), title="sent per chip and step, GB (plans that fit)")
    for axis in axes:
        axis.set(xscale="log", xlabel="chips")
        axis.set_xticks(list(GROWTH), [str(n) for n in GROWTH])
        axis.minorticks_off()
        axis.legend(frameon=False)
    figure.savefig(RESULTS / "plans.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS), help="plans to compile; default: all")
    options = parser.parse_args()
    for name in options.only:
        compiled(name)
    results = {name: compiled(name) for name in PLANS if (FOLDER / f"{name}.json").exists()}
    files.write_text(RESULTS / "plans.md", markdown(results))
    if any(name.startswith(("weak", "strong")) for name in results):
        picture(results)
    print(markdown(results))


if __name__ == "__main__":
    main()
