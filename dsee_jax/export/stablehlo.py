"""A model as a program that runs without this library: StableHLO, written by `jax.export`.

::

    model.stablehlo        the program, for any batch and length and for every platform of `PLATFORMS`
    weights.safetensors    its first argument
    signature.json         inputs, outputs, labels, constraints
    run.py                 how to call it: jax, flatbuffers, numpy and safetensors
    tokenizer.json ...     what makes its inputs

The weights are an argument, not constants of the program: they stand on the disk and in memory once whatever the shapes it
is compiled for, compile faster, may lie on any device, and those of a sibling (another seed, a merge) run through the same
program. They keep our names and our layout (in, out): turning Hugging Face's around costs a small batch a third of its time.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from dsee_jax import tree
from dsee_jax.ckpt import folders, hf_save, tensors
from dsee_jax.export import run_template
from dsee_jax.models import INPUTS
from dsee_jax.runtime import files
from dsee_jax.typing import Params

PLATFORMS = ("cpu", "cuda", "tpu")

PROGRAM, WEIGHTS, SIGNATURE, EXAMPLE = "model.stablehlo", "weights.safetensors", "signature.json", "run.py"


def exported(model: Any, params: Params) -> export.Exported:
    """Return the program ``(weights, input_ids, attention_mask, token_type_ids) -> logits`` of a model without dropout.

    Args:
      model: a Linen module with a config, as from `load_pretrained`.
      params: its params, updates folded in; only shapes and dtypes are read.

    Returns:
      What takes ``weights``, ``{path: array}`` of `dsee_jax.tree.flatten`, and int32 (batch, length) each, and returns
      float32 (batch, labels), or (batch, length, words) of causal-lm. Batch and length are symbols; the length is at most
      that of the position table, which a call checks before anything is computed.
    """

    def run(weights: dict[str, jax.Array], *inputs: jax.Array) -> Any:
        return model.apply({"params": tree.unflatten(weights)}, **dict(zip(INPUTS, inputs, strict=True)))

    longest = model.config.longest
    shape = export.symbolic_shape("batch, length", constraints=[] if longest is None else [f"length <= {longest}"])
    weights = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.flatten(params).items()}
    ids = [jax.ShapeDtypeStruct(shape, jnp.int32)] * len(INPUTS)
    with _no_paths():
        return export.export(jax.jit(run), platforms=PLATFORMS)(weights, *ids)


@contextlib.contextmanager
def _no_paths() -> Iterator[None]:
    """Keep the folders of this machine out of the source locations that a program carries for debugging."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)


def write(path: Path, model: nn.Module, params: Params, *, source: Path, labels: Sequence[str] = ()) -> None:
    """Write the folder described above.

    Args:
      path: the folder to make; whole or not there.
      model, params: as `exported`.
      source: a folder with the model's tokenizer files.
      labels: names of the classes, in the order of the logits; empty for regression.

    Raises:
      InputError: ``path`` exists and is not an empty folder.
    """
    program = exported(model, params)
    with folders.whole(path) as staging:
        (staging / PROGRAM).write_bytes(program.serialize())
        flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
        tensors.write(staging, flat, max_shard_size=1 + sum(leaf.nbytes for leaf in flat.values()))
        (staging / tensors.SINGLE).rename(staging / WEIGHTS)
        files.write(staging / SIGNATURE, signature(model, program, labels))
        shutil.copyfile(run_template.__file__, staging / EXAMPLE)
        hf_save.copy_files(source, staging)


def signature(model: Any, program: export.Exported, labels: Sequence[str]) -> dict[str, Any]:
    """Return what ``signature.json`` holds."""
    _, *inputs = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
    meanings = {
        "input_ids": f"token ids, from 0 to {model.config.vocab_size - 1}",
        "attention_mask": "1 = a token, 0 = padding; decoders: 1, 2, 3 ... the texts packed in a row",
        "token_type_ids": "0, and 1 in the second text of a pair",
    }
    (output,) = program.out_avals
    return {
        "format": "dsee_jax stablehlo 1",
        "call": f"jax.export.deserialize({PROGRAM}).call(load_file({WEIGHTS}), {', '.join(INPUTS)}); see {EXAMPLE}",
        "inputs": [
            {"name": name, "dtype": str(aval.dtype), "shape": list(map(str, aval.shape)), "what": meanings[name]}
            for name, aval in zip(INPUTS, inputs, strict=True)
        ],
        "output": {
            "dtype": str(output.dtype),
            "shape": [size if isinstance(size, int) else str(size) for size in output.shape],
            "what": {2: "logits, one a label" if labels else "the score", 3: "logits of the word that follows each"}[
                len(output.shape)
            ],
        },
        "labels": list(labels),
        "longest": model.config.longest,
        "pad_token_id": model.config.pad_token_id or 0,
        "platforms": list(program.platforms),
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }
