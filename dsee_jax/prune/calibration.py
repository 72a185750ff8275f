"""What calibration reads of a model on batches of examples: statistics of the inputs of its kernels, and its losses."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from dsee_jax import stacks, tree
from dsee_jax.deltas.attach import input_of, intercepted, linear
from dsee_jax.errors import InputError
from dsee_jax.models import INPUTS
from dsee_jax.models.architecture import Model, scans
from dsee_jax.typing import Array, Loss, Module, Params

Groups: TypeAlias = tuple[tuple[str, ...], ...]
"""Paths of kernels in groups, in the order in which the model applies them; see `groups`."""


def gram(model: Module, params: Params, batch: Mapping[str, Array]) -> dict[str, dict[str, jax.Array]]:
    """Return ``{kernel path: {"sum": (in, in), "count": ()}}``: the sum of x x^T over the inputs x of each kernel, float32.

    Padding does not count, nor do rows whose ``weights`` are all 0; prompts count. A kernel counts the positions it is applied
    to: in the last layer of a classifier, the first position only where the others are not computed. An input that belongs to
    no example, such as the embeddings of distances, counts each of its rows once per batch.
    """
    return _summed(_GRAM, model, params, batch)


def squares(model: Module, params: Params, batch: Mapping[str, Array]) -> dict[str, dict[str, jax.Array]]:
    """Return ``{kernel path: {"sum": (in,), "count": ()}}``: the diagonals of the sums of `gram`, computed directly."""
    return _summed(_SQUARES, model, params, batch)


def sizes(model: Model, params: Params, batches: Iterable[Mapping[str, Array]]) -> dict[str, jax.Array]:
    """Return ``{kernel path: (in,)}``: the root mean square of each input over all ``batches``, float32.

    All inputs are those of one model, ``params`` as they are: no layer sees the pruning of the layers below it
    (`dsee_jax.prune.layerwise` does). Scanned layers (``model.scan``) run one by one; the result of a stacked kernel is
    (layers, in).

    Raises:
      InputError: there are no batches, or none holds an example.
    """
    return {path: jnp.sqrt(mean) for path, mean in _means(_SQUARES, model, params, batches).items()}


def grams(model: Model, params: Params, batches: Iterable[Mapping[str, Array]]) -> dict[str, jax.Array]:
    """Return ``{kernel path: (in, in)}``: the mean of x x^T over the inputs of all ``batches``, float32; otherwise as `sizes`.

    A matrix of every kernel is in memory at once; `dsee_jax.prune.layerwise` holds those of one layer.
    """
    return _means(_GRAM, model, params, batches)


def losses(model: Module, loss: Loss) -> Callable[[Params, Mapping[str, Array]], jax.Array]:
    """Return ``(params, batch) -> losses`` without dropout, multiplied by the ``weights`` of the batch, in their shape."""

    def weighted(params: Params, batch: Mapping[str, Array]) -> jax.Array:
        inputs: dict[str, Any] = {name: batch[name] for name in INPUTS}
        outputs: Any = model.apply({"params": params}, **inputs, deterministic=True)
        return loss(outputs, batch) * batch["weights"]

    return weighted


def groups(model: Module, params: Params, batch: Mapping[str, Array], paths: Sequence[str]) -> Groups:
    """Return the kernels at ``paths`` in the order in which the model applies them, all kernels of a layer in one group.

    A kernel outside of the layers (``layer_0``, ``layer_1`` ...) is a group of its own. Nothing is computed.

    Raises:
      InputError: no linear module of the model applies a kernel of ``paths``.
    """
    applied: list[str] = []

    def trace(params: Params, batch: Mapping[str, Array]) -> None:
        applied.extend(_summed(_SQUARES, model, params, batch))

    jax.eval_shape(trace, params, dict(batch))
    for path in paths:
        if path not in applied:
            raise InputError(
                f"no nn.Dense applies {path!r}: its inputs are unknown; leave it out of the pruned kernels, or use a score "
                "that reads no inputs"
            )
    members: dict[str, list[str]] = {}
    for path in applied:
        if path in paths:
            stacked, number = stacks.place(path)
            layer = path if number is None else f"{stacked.partition(stacks.STACK)[0]}layer_{number}"
            members.setdefault(layer, []).append(path)
    return tuple(map(tuple, members.values()))


def check_applied(model: Model, params: Params, paths: Sequence[str]) -> None:
    """Raise `InputError` unless linear modules of the model apply all kernels at ``paths``; nothing is computed.

    Only then can a score that reads inputs be computed for all of them. Params may be shapes.
    """
    batch = {name: jax.ShapeDtypeStruct((2, 2), jnp.int32) for name in INPUTS}
    batch["weights"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    separate = paths_apart(model, paths)

    def trace(params: Params, batch: Mapping[str, Array]) -> None:
        groups(*apart(model, params), batch, separate)

    jax.eval_shape(trace, params, batch)


def sizes_of(
    model: Module, params: Params, batches: Iterable[Mapping[str, Array]], order: Groups, number: int
) -> dict[str, jax.Array]:
    """Return the `sizes` of the kernels of group ``number`` of ``order`` alone; all groups share one compiled program."""
    means = _means_of(_SQUARES, model, params, batches, order, number)
    return {path: jnp.sqrt(mean) for path, mean in means.items()}


def grams_of(
    model: Module, params: Params, batches: Iterable[Mapping[str, Array]], order: Groups, number: int
) -> dict[str, jax.Array]:
    """Return the `grams` of the kernels of group ``number`` of ``order`` alone; all groups share one compiled program."""
    return _means_of(_GRAM, model, params, batches, order, number)


def apart(model: Model, params: Params) -> tuple[Model, Params]:
    """Return a model and its params with separate layers that run one by one.

    Values recorded inside a scanned or rematerialised layer are tracers that leak out of it.
    """
    loops: dict[str, Any] = {name: False for name in ("scan", "remat") if hasattr(model, name)}
    return model.clone(**loops), stacks.unstack(params) if scans(model) else params


def paths_apart(model: Model, paths: Sequence[str]) -> list[str]:
    """Return the paths of kernels in the params of `apart`: those of a stack become one path for each layer."""
    if not scans(model):
        return [*paths]
    layers = len(next(iter(model.config.widths.values())))
    return [each for path in paths for each in stacks.paths(path, layers)]


_SQUARES, _GRAM = "bti,bti->i", "bti,btj->ij"
"""The sums over inputs (batch, positions, in)."""


def _means(equation: str, model: Model, params: Params, batches: Iterable[Mapping[str, Array]]) -> dict[str, jax.Array]:
    stacked = scans(model)
    model, params = apart(model, params)
    means = _averaged(lambda batch: _every(equation, model, params, batch), batches)
    return tree.flatten(stacks.stack(tree.unflatten(means))) if stacked else means


def _means_of(
    equation: str, model: Module, params: Params, batches: Iterable[Mapping[str, Array]], order: Groups, number: int
) -> dict[str, jax.Array]:
    means = _averaged(lambda batch: _group(equation, model, order, params, batch, jnp.int32(number)), batches)
    wide = {path: tree.get(params, path).shape[0] for path in order[number]}
    return {path: means[_slot(path, wide[path])] for path in order[number]}


def _averaged(
    sums: Callable[[Mapping[str, Array]], dict[str, dict[str, jax.Array]]], batches: Iterable[Mapping[str, Array]]
) -> dict[str, jax.Array]:
    total: Any = None
    for batch in batches:
        part = sums(dict(batch))
        total = part if total is None else _added(total, part)
    if total is None:
        raise InputError("there are no batches to measure inputs on; expected one or more, with examples")
    counts = jnp.stack([part["count"] for part in total.values()])
    if not jnp.max(counts):
        raise InputError(
            "the batches to measure inputs on hold no example: the weights of all rows, or the masks, are 0"
        )
    return {path: part["sum"] / part["count"] for path, part in total.items()}


_added = jax.jit(lambda total, part: jax.tree.map(jnp.add, total, part), donate_argnums=0)


def _slot(path: str, width: int) -> str:
    """Return the name under which the layers share one array: kernels of the same place and width."""
    return f"{stacks.place(path)[0]} ({width})"


def _summed(
    equation: str,
    model: Module,
    params: Params,
    batch: Mapping[str, Array],
    order: Groups | None = None,
    number: Array | None = None,
) -> dict[str, dict[str, jax.Array]]:
    """Return the sums by path of the kernel; with ``order``, by `_slot`, of the kernels of group ``number``, 0 for others."""
    sums: dict[str, dict[str, jax.Array]] = {}
    if len(batch["input_ids"]) == 1:
        # An input of one row is of an example then, and else of none; a filler row tells them apart.
        batch = {name: jnp.concatenate([each, each]) for name, each in batch.items()}
        batch |= {"weights": batch["weights"].at[1].set(0)}
    members = {path: each for each, group in enumerate(order or ()) for path in group}
    rows = jnp.any(batch["weights"].reshape(len(batch["weights"]), -1) != 0, axis=1)
    real = (batch["attention_mask"] != 0) & rows[:, None]

    def sum_of(x: jax.Array) -> dict[str, jax.Array]:
        x = x.astype(jnp.float32)
        # An input without an axis of positions is one vector per example.
        x = x if x.ndim == 3 else x[:, None]
        of_examples = len(x) == len(real) and x.shape[1] <= real.shape[1]
        weights = real[:, : x.shape[1], None] if of_examples else jnp.ones((*x.shape[:2], 1))
        weights = weights.astype(jnp.float32)
        return {"sum": jnp.einsum(equation, x * weights, x, precision="highest"), "count": jnp.sum(weights)}

    def zeros_of(x: jax.Array) -> dict[str, jax.Array]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(sum_of, x))

    def add(names: Iterable[str], total: dict[str, jax.Array]) -> None:
        for name in names:
            sums[name] = jax.tree.map(jnp.add, sums[name], total) if name in sums else total

    def intercept(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        if paths := linear(context):
            x = input_of(args, kwargs)
            if order is None:
                add(paths, sum_of(x))
            elif own := [path for path in paths if path in members]:
                wanted = jnp.any(jnp.array([members[path] for path in own]) == number)
                add([_slot(path, x.shape[-1]) for path in own], jax.lax.cond(wanted, sum_of, zeros_of, x))
        return call(*args, **kwargs)

    inputs: dict[str, Any] = {name: batch[name] for name in INPUTS}
    with intercepted(intercept):
        model.apply({"params": params}, **inputs, deterministic=True)
    return sums


_every = jax.jit(_summed, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _group(
    equation: str, model: Module, order: Groups, params: Params, batch: Mapping[str, Array], number: Array
) -> dict[str, dict[str, jax.Array]]:
    return _summed(equation, model, params, batch, order, number)
