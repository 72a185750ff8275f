"""Statistics of a tuned model that merging uses as weights: the diagonal Fisher information, and Gram matrices.

Both are means over training examples of a finished run, in float32 and without dropout. The safetensors file has the tensor
names of the exported model; its metadata has ``kind``, ``examples`` and ``task``::

    fisher   for every tensor, in its shape: the mean over examples x of E_{y ~ p(y|x)} (d log p(y|x) / dw)^2
    gram     for the kernel of every matrix product, under the name of its weight: (in, in), the mean over tokens of x x^T

Merging by Fisher information: Matena & Raffel 2022 (arXiv 2111.09832); by Gram matrices: Jin et al. 2023 (arXiv 2212.09849).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.ckpt import hf_names, tensors
from dsee_jax.ckpt.folders import MODEL
from dsee_jax.data.batches import bucket_edges, eval_batches
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import Layout
from dsee_jax.models import INPUTS
from dsee_jax.prune import calibration
from dsee_jax.runtime import atomic, console
from dsee_jax.train import finished_run, inputs
from dsee_jax.typing import Array, Module, Params

EXAMPLES = 256
"""Training examples, unless the caller says otherwise."""


def fisher(model: Module, params: Params, batch: Mapping[str, Array], *, regression: bool) -> dict[str, Any]:
    """Return the diagonal of the Fisher information summed over the examples of a batch, a tree like ``params``, float32.

    Gradients are squared for each example and each class, before any sum; the expectation over the classes is exact, under
    the model's own probabilities. A regression is a Gaussian of variance 1, whose Fisher information is the squared gradient
    of its mean. Rows are weighted by ``batch["weights"]``.
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


def _outputs(model: Module, params: Params, batch: Mapping[str, Array]) -> Any:
    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS}
    return model.apply({"params": params}, **inputs, deterministic=True)


def _rows(share: Array, like: jax.Array) -> Array:
    """Return (n,) as (n, 1, 1, ...), which broadcasts to ``like`` (n, ...)."""
    return share.reshape(-1, *(1,) * (like.ndim - 1))


def collect(
    run: Path, kind: Literal["fisher", "gram"], *, examples: int = EXAMPLES, overrides: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the statistics of a finished run and the metadata of their file.

    Args:
      run: the folder of the run; the updates are folded into the weights, as in an export.
      kind: fisher or gram.
      examples: the number of training examples, drawn with the run's seed; 0: all of the run's training examples.
      overrides: keys of the run's config, ``section.key=value``.

    Raises:
      InputError: the run is not finished, its data cannot be read again or has fewer examples, or gram is asked of an
        architecture whose files store kernels as (in, out), while merging by Gram matrices expects (out, in).
    """
    drawn = [f"data.examples={examples}"] if examples else []
    finished = finished_run.load(run, [*overrides, *drawn, "data.packing=false", "generate.new_tokens=0"])
    if kind == "fisher" and (problem := finished.task.problem) not in ("single_label_classification", "regression"):
        raise InputError(
            f"{run}: fisher is for texts with one label, and the task of the run is {problem}: use --kind gram"
        )
    names = hf_names.names(finished.model)
    if kind == "gram":
        _check_stored(names)
    data = inputs.read_data(finished.config, finished.task, run / MODEL, finished.model)
    params, regression = finished_run.plain_params(finished), finished.task.regression
    if kind == "fisher":
        step = jax.jit(lambda params, batch: fisher(finished.model, params, batch, regression=regression))
    else:
        step = jax.jit(lambda params, batch: calibration.gram(finished.model, params, batch))
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
    edges = bucket_edges(data.train.lengths, limit=4)
    total, done, count = None, 0, data.train.size
    with console.bar(kind, done, count) as advance:
        for batch, rows in eval_batches(data.train, _batch_size(kind), edges):
            part = step(params, batch)
            total = part if total is None else add(total, part)
            done += len(rows)
            advance(done, "")
    about = {"kind": kind, "examples": str(count), "task": finished.task.name}
    sums: Any = total
    if kind == "fisher":
        return hf_names.hf_tensors(finished.model, jax.tree.map(lambda squares: squares / count, sums)), about
    return {names[path][0]: np.asarray(part["sum"] / part["count"]) for path, part in sums.items()}, about


def _check_stored(names: Mapping[str, tuple[str, Layout]]) -> None:
    for path, (name, layout) in names.items():
        if path.endswith("/kernel") and not layout.transposed:
            raise InputError(
                f"{name!r} is stored (in, out); merging by Gram matrices reads (out, in): use --kind fisher"
            )


def _batch_size(kind: str) -> int:
    """Return the examples per step; Fisher information needs memory for one gradient of all weights per example."""
    if kind == "gram":
        return 32
    # Measured on a CPU of two cores: a step over several examples is three times slower than one example after another.
    return 1 if jax.default_backend() == "cpu" else 8


def write(run: Path, out: Path, kind: Literal["fisher", "gram"], **options: Any) -> dict[str, str]:
    """Write the result of `collect` to the file ``out``, completely or not at all; return the metadata of the file.

    Raises:
      InputError: ``out`` exists, does not end in ``.safetensors`` or has no parent folder; and see `collect`.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"{out} is not named as a safetensors file: end it in .safetensors")
    if out.exists():
        raise InputError(f"{out} exists: name a new file, or delete it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: there is no folder {out.parent}; create it first")
    arrays, about = collect(run, kind, **options)
    with atomic.file(out) as partial:
        tensors.save(partial, arrays, metadata=about)
    return about
