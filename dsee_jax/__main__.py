"""``python -m dsee_jax VERB ...``: what can be done with a finished run and with checkpoints."""

import argparse
import json
import sys
from typing import Any

from dsee_jax import heap
from dsee_jax.errors import InputError
from dsee_jax.stores import StoreError


def evaluate(options: argparse.Namespace) -> None:
    """Print the final metrics again, from the files of a run."""
    from dsee_jax import finished, processes, stores

    processes.join(options)
    with processes.watched(InputError):
        found = finished.evaluate(stores.local(options.run), options.overrides)
    if processes.first():
        print(json.dumps(found, indent=1))


def export(options: argparse.Namespace) -> None:
    """Write the model of a run for another tool."""
    from dsee_jax import finished, stores

    with stores.written(options.out, overwrite=False) as out:
        finished.export(stores.local(options.run), out, form=options.format, factors=options.factors)
    print(options.out)


def report(options: argparse.Namespace) -> None:
    """Print the tables of a finished run again, and draw it."""
    from dsee_jax import pictures, stores
    from dsee_jax import report as reports
    from dsee_jax.ckpt.folders import read_json

    place, run = stores.place(options.run), stores.local(options.run)
    if not (run / "metrics.json").exists():
        raise InputError(f"{place} is no finished run: it has no metrics.json")
    reports.final(read_json(run / "metrics.json"), place, reports.show)
    for name, file in pictures.draw(run, reports.show).items():
        if stores.remote(place):
            stores.put(file, place / file.name)
        reports.show(f"{name:8} {place / file.name}")


def inspect(options: argparse.Namespace) -> None:
    """Compare two checkpoints, layer by layer."""
    from dsee_jax import inspection, journal, stores
    from dsee_jax import report as reports
    from dsee_jax.ckpt.resolve import resolve

    file = stores.target(options.json, "--json") if options.json else None
    found = inspection.compare(resolve(options.before), resolve(options.after))
    if file:
        journal.write(file, found)
    reports.show(inspection.table(found, every_tensor=options.tensors))
    for kind in ("only_before", "only_after"):
        if found[kind]:
            reports.show(f"{kind.replace('_', ' ')}: {', '.join(found[kind][:4])} ({len(found[kind])} tensors)")


def statistics(options: argparse.Namespace) -> None:
    """Collect what the merges fisher and regmean need."""
    from dsee_jax import statistics, stores

    run = stores.local(options.run)
    with stores.written(options.out, overwrite=False) as out:
        about = statistics.write(run, out, options.kind, examples=options.examples, overrides=options.overrides)
    print(f"{options.out}: {about['kind']} of {about['examples']} examples of {about['task']}")


def generate(options: argparse.Namespace) -> None:
    """Go on from prompts with a decoder."""
    import jax

    from dsee_jax import completion, stores

    prompts = list(options.prompt)
    if options.file:
        try:
            prompts += stores.local(options.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--file {options.file}: cannot be read ({error})") from None
    if not prompts:
        raise InputError("there is no prompt: give --prompt TEXT or --file FILE")
    chosen = {name: getattr(options, name) for name in completion.CHOICES}
    if options.repetition_penalty is not None:
        chosen["repetition_penalty"] = options.repetition_penalty
    writer = completion.opened(options.model, dtype=options.dtype)
    for prompt, text in zip(
        prompts, completion.complete(writer, prompts, key=jax.random.key(options.seed), **chosen), strict=True
    ):
        print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) if options.json else prompt + text)


def plan(options: argparse.Namespace) -> None:
    """Compile a run's training step ahead of time, and tell what it takes and what bounds it."""
    from dsee_jax import config, journal, plan, stores
    from dsee_jax import report as reports

    file = stores.target(options.json, "--json") if options.json else None
    asked = config.read(options.config, options.overrides)
    found = plan.plan(asked, options.topology, labels=options.labels)
    if options.largest:
        found["largest_batch"] = plan.largest(asked, options.topology, labels=options.labels)
    if file:
        journal.write(file, found)
    for table in plan.tables(found):
        reports.show(table)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    from dsee_jax import processes

    top = argparse.ArgumentParser(prog="python -m dsee_jax", description=__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(function: Any, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(function.__name__, help=function.__doc__.rstrip("."), description=text)
        added.set_defaults(function=function)
        return added

    one = verb(
        evaluate,
        "Load model/ and adapter/ of a finished run, evaluate them on the dev set of its config and print the metrics as "
        "JSON. Keys of the config can be overridden, for instance --data.max_length=64 or --data.dir=ELSEWHERE.",
    )
    one.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    processes.arguments(one)
    two = verb(export, "Write a finished run's model as one folder, for another tool.")
    two.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    two.add_argument("out", metavar="OUT", help="the folder to make")
    two.add_argument(
        "--format",
        choices=["hf", "compact", "stablehlo", "peft"],
        default="hf",
        help="hf: any tool opens it, what was cut out is zeros again; compact: only what was kept, for this library; "
        "stablehlo: a program for any batch and length that runs with jax alone; peft: the low-rank updates and the head of a "
        "run without sparse values and pruning",
    )
    two.add_argument(
        "--factors",
        action="store_true",
        help="keep the pruned weights sparse and put the updates beside them in OUT/adapter; "
        "without it they are folded in, and any tool gets the tuned logits",
    )
    three = verb(
        report,
        "Print the scores and costs of a finished run, and draw pictures into its folder (extra `plot`): its curves, which "
        "heads and neurons were kept, the share of zeros of every kernel, the search for a ticket.",
    )
    three.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    four = verb(
        inspect,
        "Compare two checkpoints of one model: relative change, share of entries that did not change, zeros, and effective "
        "rank of the change (exp of the entropy of its singular values), a row a layer.",
    )
    four.add_argument("before", metavar="A", help="a model folder, hub id or package:NAME")
    four.add_argument("after", metavar="B", help="the same, tuned")
    four.add_argument("--tensors", action="store_true", help="a row a tensor instead of a layer")
    four.add_argument("--json", metavar="FILE", help="write all figures there as well")
    five = verb(
        statistics,
        "Run the model of a finished run over training examples and write what merging weighs by: fisher, the diagonal "
        "Fisher information of every tensor, or gram, the mean of x x^T over the inputs of every kernel. Keys of the config "
        "can be overridden, for instance --data.dir=ELSEWHERE.",
    )
    five.add_argument("run", metavar="RUN_DIR", help="the output_dir of a finished run")
    five.add_argument("out", metavar="OUT", help="the safetensors file to make")
    five.add_argument("--kind", choices=["fisher", "gram"], required=True, help="for the merge fisher, or for regmean")
    five.add_argument(
        "--examples",
        type=int,
        default=256,
        metavar="N",
        help="how many, drawn with the run's seed; 0: all; default 256",
    )
    six = verb(
        generate,
        "Go on from prompts with a decoder: a Hugging Face folder, hub id or package:NAME, or the output_dir of a run, whose "
        "updates stay attached. All prompts are one batch. By default the most probable token is taken each time, until "
        "the model's end of text or --new-tokens; --beams searches for the most probable text, --temperature samples.",
    )
    six.add_argument("model", metavar="MODEL", help="a model folder, hub id, package:NAME or RUN_DIR")
    six.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    six.add_argument("--file", metavar="FILE", help="one prompt a line, after those of --prompt")
    six.add_argument("--new-tokens", type=int, default=64, metavar="N", help="the most to add; default 64")
    six.add_argument("--beams", type=int, default=1, metavar="N", help="beam search with so many; default 1: none")
    six.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="beams: above 0 prefers longer texts; default 1"
    )
    six.add_argument(
        "--early-stopping", action="store_true", help="beams: stop once as many texts ended as there are beams"
    )
    six.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: less of what was said; default: as the model's files",
    )
    six.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="sample; 1: as probable as the model says"
    )
    six.add_argument("--top-k", type=int, default=0, metavar="N", help="sample among the N most probable tokens")
    six.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample among those that make up X of all")
    six.add_argument("--seed", type=int, default=0, help="decides what is sampled; default 0")
    six.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    six.add_argument("--json", action="store_true", help="an object a line: prompt, completion")
    seven = verb(
        plan,
        "Lower and compile the training step of a config with no weights and no data, for the devices here or for a TPU "
        "topology that need not be there, and tell: bytes a chip against its memory, operations and bytes of a step, every "
        "collective with its bytes and mesh axis, the roofline and what bounds it. model.path may be a folder with a "
        "config.json alone. Keys of the config can be overridden, for instance --mesh.fsdp=16.",
    )
    seven.add_argument("config", metavar="CONFIG", help="a YAML file of train.py")
    seven.add_argument(
        "--topology", default="", metavar="KIND:SHAPE", help="v5e:4x4, v5e:16x16, v6e:16x16, v5p:4x4x8 (extra `tpu`)"
    )
    seven.add_argument("--labels", type=int, default=2, metavar="N", help="of a classifier; 1: regression; default 2")
    seven.add_argument(
        "--largest", action="store_true", help="search for the largest batch that fits; compiles several times"
    )
    seven.add_argument("--json", metavar="FILE", help="write all figures there as well")
    return top


def main(arguments: list[str]) -> int:
    """Return the exit status: 0; 2 for bad input (one line on stderr, nothing written); 1 where a store took no output."""
    options, rest = parser().parse_known_args(arguments)
    heap.keep()
    try:
        if rest and options.verb not in ("evaluate", "statistics", "plan"):
            raise InputError(f"{options.verb} takes no {rest[0]!r}; see --help")
        options.overrides = rest
        options.function(options)
    except InputError as error:
        print(f"dsee_jax {options.verb}: {error}", file=sys.stderr)
        return 2
    except StoreError as error:
        print(f"dsee_jax {options.verb}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
