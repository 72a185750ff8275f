"""A model as a StableHLO program, written by `jax.export`, that runs without this library.

::

    model.stablehlo        the program, for any batch and length and for every platform of `PLATFORMS`
    weights.safetensors    its first argument
    signature.json         inputs, outputs, labels, constraints
    run.py                 an example call; needs jax, flatbuffers, numpy and safetensors
    tokenizer.json ...     the tokenizer of its inputs

The weights are an argument of the program, not constants. So disk and memory have one copy for all shapes, compilation is
faster, the weights can be on any device, and one program runs the weights of other models (another seed, a merge). They
have the names and the layout (in, out) of this library: transposing Hugging Face's layout takes a third of the time of a
small batch.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from dsee_jax import tree
from dsee_jax.ckpt import companions, tensors
from dsee_jax.export import run_template
from dsee_jax.models import INPUTS
from dsee_jax.models.architecture import Model
from dsee_jax.runtime import files
from dsee_jax.typing import Params

PLATFORMS = ("cpu", "cuda", "tpu")

_MEANINGS = {
    "causal-lm": "logits of the next token",
    "question-answering": "logits of each token to begin and to end the answer",
    "token-classification": "logits, one per label, of each token",
}
"""The meaning of the outputs of tasks with an output per token."""

PROGRAM, WEIGHTS, SIGNATURE, EXAMPLE = "model.stablehlo", "weights.safetensors", "signature.json", "run.py"


def export_program(model: Model, params: Params) -> export.Exported:
    """Return the program ``(weights, input_ids, attention_mask, token_type_ids) -> logits`` of a model without dropout.

    ``weights`` is ``{path: array}`` as from `dsee_jax.tree.flatten`, the inputs are int32 (batch, length), the logits
    float32 (batch, labels), or (batch, length, ...) for tasks with an output per token. Batch and length are symbolic. A call
    checks first that the length does not exceed the position table.

    Args:
      model: a Linen module with a config, from `load_pretrained`.
      params: its params with updates folded in; only shapes and dtypes are read.
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
    """Remove the folders of this machine from the source locations in the debug info of a program."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)


def write(path: Path, model: Model, params: Params, *, source: Path, labels: Sequence[str] = ()) -> None:
    """Write the program, its weights, its signature, an example and the tokenizer.

    Args:
      path: the new folder; it appears when it is complete.
      model, params: as in `export_program`.
      source: a folder with the tokenizer files of the model.
      labels: class names in the order of the logits; empty for regression.

    Raises:
      InputError: ``path`` exists and is not an empty folder.
    """
    program = export_program(model, params)
    with files.folder(path) as staging:
        (staging / PROGRAM).write_bytes(program.serialize())
        flat = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
        tensors.write(staging, flat, max_shard_size=1 + sum(leaf.nbytes for leaf in flat.values()))
        (staging / tensors.SINGLE).rename(staging / WEIGHTS)
        files.write(staging / SIGNATURE, signature(model, program, labels))
        shutil.copyfile(run_template.__file__, staging / EXAMPLE)
        companions.copy(source, staging, companions.tokenizer_files(source))


def signature(model: Model, program: export.Exported, labels: Sequence[str]) -> dict[str, Any]:
    """Return the content of ``signature.json``."""
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
            "what": _MEANINGS.get(model.task) or ("logits, one per label" if labels else "the score"),
        },
        "labels": list(labels),
        "longest": model.config.longest,
        "vocab_size": model.config.vocab_size,
        "pad_token_id": model.config.pad_token_id or 0,
        "platforms": list(program.platforms),
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }
