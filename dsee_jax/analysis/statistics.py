"""What data say about a tuned model's weights, for the merges that weigh by it: Fisher information and Gram matrices.

Both are means over training examples of a finished run, in float32, dropout off, saved as safetensors under the names that
the exported model has; the metadata of the file tells ``kind``, ``examples`` and ``task``::

    fisher   of every tensor, in its shape: the mean over examples x of E_{y ~ p(y|x)} (d log p(y|x) / dw)^2
    gram     of every kernel that multiplies, under its weight's name: (in, in), the mean over tokens of x x^T

Matena & Raffel 2022 (arXiv 2111.09832) merge by the first, Jin et al. 2023 (arXiv 2212.09849) by the second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from dsee_jax.ckpt import hf_names
from dsee_jax.ckpt.folders import MODEL
from dsee_jax.data.batches import bucket_edges, eval_batches
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import Layout
from dsee_jax.models import INPUTS
from dsee_jax.prune import calibration
from dsee_jax.runtime import console
from dsee_jax.train import inputs, reopen
from dsee_jax.typing import Array, Params

EXAMPLES = 256


def fisher(model: nn.Module, params: Params, batch: Mapping[str, Array], *, regression: bool) -> dict[str, Any]:
    """Return the diagonal of the Fisher information summed over the examples of a batch, a tree like ``params``, float32.

    Gradients are squared for each example and each class, before any sum; the mean over the classes is exact, weighted by
    the model's own probabilities. A regression is a Gaussian of variance 1, whose Fisher information is the squared
    gradient of its mean. Rows are weighted by ``batch["weights"]``.
    """

    def score(params: Params, row: Mapping[str, Array], label: Array) -> jax.Array:
        logits = _outputs(model, params, {name: leaf[None] for name, leaf in row.items()})
        return logits[0, 0] if regression else jax.nn.log_softmax(logits[0])[label]

    rows = {name: batch[name] for name in INPUTS}
    outputs = jax.eval_shape(lambda: _outputs(model, params, rows))
    gradients = jax.vmap(jax.value_and_grad(score), in_axes=(None, 0, None))

    def add(total: dict[str, Any], label: jax.Array) -> tuple[dict[str, Any], None]:
        scores, gradient = gradients(params, rows, label)
        share = batch["weights"] * (1.0 if regression else jnp.exp(scores))
        return jax.tree.map(lambda t, g: t + jnp.sum(_rows(share, g) * g * g, axis=0), total, gradient), None

    start = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), dict(params))
    return jax.lax.scan(add, start, jnp.arange(outputs.shape[1]))[0]


def _outputs(model: nn.Module, params: Params, batch: Mapping[str, Array]) -> Any:
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS}
    return model.apply({"params": params}, **inputs, deterministic=True)


def _rows(share: Array, like: jax.Array) -> Array:
    """Return (n,) as (n, 1, 1, ...) beside ``like`` (n, ...)."""
    return share.reshape(-1, *(1,) * (like.ndim - 1))


def collect(
    run: Path, kind: Literal["fisher", "gram"], *, examples: int = EXAMPLES, overrides: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the statistics of a finished run and the metadata of their file.

    Args:
      run: its folder; its updates are folded in, as the export does.
      kind: fisher or gram.
      examples: how many training examples, drawn with the run's seed; 0 for all that it was trained on.
      overrides: keys of its config, ``section.key=value``.

    Raises:
      InputError: no finished run, its data cannot be read again, it has fewer examples, or the Gram matrices are of an
        architecture whose files keep kernels (in, out), which merging by them does not read.
    """
    drawn = [f"data.examples={examples}"] if examples else []
    found = reopen.opened(run, [*overrides, *drawn, "data.packing=false", "generate.new_tokens=0"])
    if kind == "fisher" and found.task.causal:
        raise InputError(
            f"{run}: a language model has as many classes as words at every token, and fisher takes a gradient of each: "
            "use --kind gram"
        )
    names = hf_names.names(found.model)
    if kind == "gram":
        _check_stored(names)
    data = inputs.read_data(found.config, found.task, run / MODEL, found.model)
    params, regression = reopen.folded(found), found.task.regression
    if kind == "fisher":
        step = jax.jit(lambda params, batch: fisher(found.model, params, batch, regression=regression))
    else:
        step = jax.jit(lambda params, batch: calibration.gram(found.model, params, batch))
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    edges = bucket_edges(data.train.lengths, limit=4)
    total, done, count = None, 0, data.train.size
    with console.bar(kind, done, count) as advance:
        for batch, rows in eval_batches(data.train, _at_once(kind), edges):
            part = step(params, batch)
            total = part if total is None else add(total, part)
            done += len(rows)
            advance(done, "")
    about = {"kind": kind, "examples": str(count), "task": found.task.name}
    sums: Any = total
    if kind == "fisher":
        return hf_names.hf_tensors(found.model, jax.tree.map(lambda squares: squares / count, sums)), about
    return {names[path][0]: np.asarray(part["sum"] / part["count"]) for path, part in sums.items()}, about


def _check_stored(names: Mapping[str, tuple[str, Layout]]) -> None:
    for path, (name, layout) in names.items():
        if path.endswith("/kernel") and not layout.transposed:
            raise InputError(
                f"{name!r} is stored (in, out); merging by Gram matrices reads (out, in): use --kind fisher"
            )


def _at_once(kind: str) -> int:
    """How many examples to compute together; Fisher holds a gradient of every weight for each of them."""
    if kind == "gram":
        return 32
    # Measured on two cores: products batched over examples take a CPU three times as long as one example after another.
    return 1 if jax.default_backend() == "cpu" else 8


def write(run: Path, out: Path, kind: Literal["fisher", "gram"], **options: Any) -> dict[str, str]:
    """Write what `collect` returns to the file ``out``, whole or not at all; return its metadata.

    Raises:
      InputError: ``out`` exists, is not called ``.safetensors`` or has no folder, and as `collect`.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"{out} is not named as a safetensors file: end it in .safetensors")
    if out.exists():
        raise InputError(f"{out} exists: name a new file, or delete it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}; make it first")
    arrays, about = collect(run, kind, **options)
    beside = out.with_name(f"{out.name}.partial")
    # safetensors writes the memory of a strided view as it lies, in the wrong order; files that it makes itself are for the
    # eyes of their owner only.
    beside.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=about))
    beside.replace(out)
    return about
