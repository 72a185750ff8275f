"""Generate text from prompts with a decoder."""

import argparse
import json

from dsee_jax.config import SEEDS
from dsee_jax.errors import InputError

DESCRIPTION = (
    "Generate text from prompts with a decoder: a Hugging Face folder, GGUF file, hub id or package:NAME, or the output_dir "
    "of a run, with its updates attached. All prompts are one batch. By default each token is the most probable one, up to "
    "an end of text or --new-tokens; --beams searches for the most probable text, --temperature samples."
)
EXAMPLE = 'python -m dsee_jax generate runs/writer --prompt "Once upon a time" --beams 4'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the verb."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, GGUF file, hub id, package:NAME or RUN_DIR")
    parser.add_argument(
        "--adapter", default="", metavar="DIR", help="an adapter of this library or of PEFT that was trained on MODEL"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeat the flag for several prompts"
    )
    parser.add_argument("--file", metavar="FILE", help="a text file with one prompt per line; added to --prompt")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="the most new tokens; default 64")
    parser.add_argument("--beams", type=int, default=1, metavar="N", help="beam search with N beams; default 1: off")
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="beams: a value above 0 prefers longer texts; default 1",
    )
    parser.add_argument("--early-stopping", action="store_true", help="beams: stop as soon as N texts have ended")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: fewer repeated tokens; default: the value in the model's files",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="above 0: sample; 1 = the model's probabilities; default 0",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="sample from the N most probable tokens; default 0: all"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="sample from the most probable tokens with total probability X; default 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the samples; default 0")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products; default float32"
    )
    parser.add_argument(
        "--allow-unknown", action="store_true", help="ignore fields of config.json that this library does not know"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line: prompt, completion")


def run(options: argparse.Namespace) -> None:
    """Print every prompt with its completion."""
    import jax

    from dsee_jax.generation import pipeline
    from dsee_jax.runtime import input_file, storage

    prompts = list(options.prompt)
    if options.file:
        file = storage.download(options.file)
        input_file.check(file)
        try:
            prompts += file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--file {options.file}: not readable ({error})") from None
    if not prompts:
        raise InputError("no prompt: give --prompt TEXT or --file FILE")
    if not 0 <= options.seed < SEEDS:
        raise InputError(f"--seed is {options.seed}; expected 0 to {SEEDS - 1}")
    chosen = {name: getattr(options, name) for name in pipeline.CHOICES}
    if options.repetition_penalty is not None:
        chosen["repetition_penalty"] = options.repetition_penalty
    writer = pipeline.load(
        options.model, other=options.adapter, dtype=options.dtype, allow_unknown=options.allow_unknown
    )
    texts = pipeline.complete(writer, prompts, key=jax.random.key(options.seed), **chosen)
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "completion": text}, ensure_ascii=False) if options.json else prompt + text)
