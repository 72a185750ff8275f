"""Go on from prompts with a decoder."""

import argparse
import json

from dsee_jax.errors import InputError

DESCRIPTION = (
    "Go on from prompts with a decoder: a Hugging Face folder, hub id or package:NAME, or the output_dir of a run, whose "
    "updates stay attached. All prompts are one batch. By default the most probable token is taken each time, until "
    "the model's end of text or --new-tokens; --beams searches for the most probable text, --temperature samples."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, hub id, package:NAME or RUN_DIR")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument("--file", metavar="FILE", help="one prompt a line, after those of --prompt")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="the most to add; default 64")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="beam search with so many; default 1: none")
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="X", help="beams: above 0 prefers longer texts; default 1"
    )
    parser.add_argument(
        "--early-stopping", action="store_true", help="beams: stop once as many texts ended as there are beams"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: less of what was said; default: as the model's files",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="sample; 1: as probable as the model says"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="sample among the N most probable tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="sample among those that make up X of all"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides what is sampled; default 0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products")
    parser.add_argument("--json", action="store_true", help="an object a line: prompt, completion")


def run(options: argparse.Namespace) -> None:
    """Run the verb with its parsed flags."""
    import jax

    from dsee_jax.generation import pipeline
    from dsee_jax.runtime import storage

    prompts = list(options.prompt)
    if options.file:
        try:
            prompts += storage.download(options.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--file {options.file}: cannot be read ({error})") from None
    if not prompts:
        raise InputError("there is no prompt: give --prompt TEXT or --file FILE")
    chosen = {name: getattr(options, name) for name in pipeline.CHOICES}
    if options.repetition_penalty is not None:
        chosen["repetition_penalty"] = options.repetition_penalty
    writer = pipeline.opened(options.model, dtype=options.dtype)
    for prompt, text in zip(
        prompts, pipeline.complete(writer, prompts, key=jax.random.key(options.seed), **chosen), strict=True
    ):
        print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) if options.json else prompt + text)
