"""The flags of mergekit-yaml, accepted so that its commands run unmodified; most of them choose how mergekit computes."""

import argparse
from typing import Any

from dsee_jax.errors import InputError

FLAGS = {
    "allow_crimes": bool,
    "unsafe_truncate_embeddings": bool,
    "transformers_cache": str,
    "lora_merge_cache": str,
    "lora_merge_dtype": str,
    "cuda": bool,
    "device": str,
    "low_cpu_memory": bool,
    "out_shard_size": str,
    "copy_tokenizer": bool,
    "clone_tensors": bool,
    "trust_remote_code": bool,
    "random_seed": int,
    "lazy_unpickle": bool,
    "write_model_card": bool,
    "safe_serialization": bool,
    "quiet": bool,
    "read_to_gpu": bool,
    "multi_gpu": bool,
    "num_threads": int,
    "gpu_rich": bool,
    "async_write": bool,
    "write_threads": int,
}
"""The flags of mergekit-yaml 0.1.5 and the types of their values; some recipes hold them as keys."""

_EFFECTIVE = ("out_shard_size", "random_seed", "quiet")
_SHORT = {"num_threads": ("-j",)}
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}
_DEFAULTS = {"copy_tokenizer": True, "write_model_card": True, "safe_serialization": True}
_REASONS = {
    "trust_remote_code": "no code of a model's folder ever runs",
    "transformers_cache": "set HF_HUB_CACHE",
    "unsafe_truncate_embeddings": "models with other vocabularies need tokenizer_source",
    "allow_crimes": "models must have the same tensors",
    "lora_merge_dtype": "adapters are added in float32",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser, each None unless it is given."""
    names = ", ".join(f"--{name.replace('_', '-')}" for name in FLAGS)
    group = parser.add_argument_group(
        "mergekit's flags",
        "The flags of mergekit-yaml are accepted. --out-shard-size N (such as 5B; bytes), --random-seed N, for methods that "
        f"draw random numbers, and --quiet have an effect; the others need none: {names}, -v.",
    )

    def flag(*options: str, **more: Any) -> None:
        group.add_argument(*options, default=None, help=argparse.SUPPRESS, **more)

    for name, kind in FLAGS.items():
        option = f"--{name.replace('_', '-')}"
        if kind is bool:
            flag(option, action=argparse.BooleanOptionalAction)
        else:
            flag(*_SHORT.get(name, ()), option, type=kind, metavar="N")
    flag("-v", "--verbose", action="count")


def shard_size(options: argparse.Namespace) -> str | int:
    """Return the maximum size of a shard: bytes, or text such as ``5GB``; raises `InputError`."""
    text = options.out_shard_size
    if text is None:
        return options.max_shard_size
    number, unit = (text[:-1], text[-1:].lower()) if text[-1:].lower() in _UNITS else (text, "")
    if not number.isdecimal() or len(number) > 15 or int(number) == 0:
        raise InputError(f"--out-shard-size {text} is no size; expected a number of bytes such as 5B, 500M or 1000000")
    return int(number) * _UNITS.get(unit, 1)


def notes(options: argparse.Namespace) -> list[str]:
    """Return one line for the given flags that have no effect, and one for each that may mislead."""
    given = [name for name in FLAGS if getattr(options, name) is not None and name not in _EFFECTIVE]
    given = [name for name in given if getattr(options, name) != _DEFAULTS.get(name)]
    told = [name for name in given if name in _REASONS and getattr(options, name) is not False]
    rest = [name for name in given if name not in told] + (["verbose"] if options.verbose else [])
    lines = [f"{_written(options, name)} has no effect: {_REASONS[name]}" for name in told]
    return ([f"{', '.join(_written(options, name) for name in rest)}: no effect here"] if rest else []) + lines


def _written(options: argparse.Namespace, name: str) -> str:
    if name == "verbose":
        return "-v"
    return f"--{'no-' if getattr(options, name) is False else ''}{name.replace('_', '-')}"
