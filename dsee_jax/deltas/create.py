"""New updates of a pretrained tree: low-rank factors that start at zero, and supports chosen from each kernel."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax import orientation, prng, stacks, tree
from dsee_jax.auto_axes import auto_sharded
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas.adapter import Adapter
from dsee_jax.deltas.supports import SUPPORTS
from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Key

_CHUNK_BYTES = 1 << 28
"""The most bytes of float32 kernels whose supports are chosen in one call: all query and value kernels of a RoBERTa-large. The
selectors make several copies of their input."""


def init(params: object, config: DeltaConfig, *, key: Key) -> Adapter:
    """Create the updates of every kernel that ``config.targets`` matches; the updated model still equals the pretrained model.

    ``a`` (in, rank) is normal with standard deviation 0.02. ``b`` (rank, out) and ``values`` (nonzeros,) are 0. Supports are
    chosen from the pretrained kernels. A stack of kernels gets stacked updates, equal to those of its layers as separate
    kernels.

    Args:
      params: the pretrained weights: any pytree. Targets are floating kernels of any `dsee_jax.orientation`.
      config: targets, rank, alpha, nonzeros, support. A ``budget`` is a share of all arrays of ``params``.
      key: decides ``a`` and the random choices of the selectors; folded with the index of the kernel among the targets, every
        layer of a stack counted.

    Returns:
      An adapter with ``config.scale``; without deltas when rank and nonzeros are 0.

    Raises:
      InputError: the config or the key is of another type; a target matches nothing or an array that is no kernel; an
        orientation does not fit the axes of a kernel; or rank or nonzeros are too large for a kernel.
    """
    if not isinstance(config, DeltaConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(
            f"the config is of the type {type(config).__name__}; expected a DeltaConfig: use dsee_jax.DeltaConfig(targets=...)"
        )
    prng.check(key)
    flat = tree.arrays(params)
    config = with_budget(params, config, sum(math.prod(leaf.shape) for leaf in flat.values()))
    if not config.rank and not config.nonzeros:
        return Adapter({}, {}, config.scale, config.scale_sparse)
    orientations = _targets(config, flat)
    matrices = {path: orientation.matrix_shape(flat[path].shape, axes) for path, axes in orientations.items()}
    keys = _keys(matrices, key)
    deltas: dict[str, Array] = {}
    for path, shape in matrices.items():
        parts = _parts(shape, config)
        if "a" in parts:
            normal = functools.partial(jax.random.normal, shape=parts["a"][-2:], dtype=jnp.float32)
            deltas[f"{path}/a"] = 0.02 * jax.vmap(normal)(keys[path]).reshape(parts["a"])
        deltas |= {f"{path}/{part}": jnp.zeros(each, jnp.float32) for part, each in parts.items() if part != "a"}
    chosen = {path: orientation.matrix(flat[path], axes) for path, axes in orientations.items()}
    supports = _supports(chosen, keys, config) if config.nonzeros else {}
    return Adapter(
        tree.unflatten(deltas),
        tree.unflatten(supports),
        config.scale,
        config.scale_sparse,
        tuple((path, axes) for path, axes in orientations.items() if axes not in orientation.USUAL),
    )


def shapes(params: object, config: DeltaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the deltas of `init` by path, also for a rank or nonzeros that are too large for a kernel.

    ``params`` may be shapes. Raises `InputError` as `init` does for the targets.
    """
    flat = tree.arrays(params)
    orientations = _targets(dataclasses.replace(config, rank=0, nonzeros=0, start=""), flat)
    return {
        f"{path}/{part}": shape
        for path, axes in orientations.items()
        for part, shape in _parts(orientation.matrix_shape(flat[path].shape, axes), config).items()
    }


def _parts(shape: tuple[int, ...], config: DeltaConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the arrays of the update of a matrix (stack..., in, out), by name."""
    *stack, rows, columns = shape
    low_rank = {"a": (*stack, rows, config.rank), "b": (*stack, config.rank, columns)} if config.rank else {}
    return low_rank | ({"values": (*stack, config.nonzeros)} if config.nonzeros else {})


def with_budget(params: object, config: DeltaConfig, weights: int) -> DeltaConfig:
    """Return ``config`` with the rank of its budget: the largest whose updates have at most ``budget * weights`` entries.

    All targets have one rank: a kernel (in, out) then trains ``rank * (in + out)`` entries, in proportion to its sides, and
    all updates share the scale ``alpha / rank``. The rank is at most the smaller side of any target. The result has the budget
    0; a config with this budget is returned as it is.

    Args:
      params: the pretrained weights, or their shapes.
      config: targets, budget, nonzeros.
      weights: the number of weights that the budget is a share of.

    Raises:
      InputError: the budget is too small for rank 1; the message names the least. Or as `init`.
    """
    if not (budget := config.budget):
        return config
    flat = tree.arrays(params)
    config = dataclasses.replace(config, budget=0.0)
    orientations = _targets(dataclasses.replace(config, rank=0), flat)
    shapes = [orientation.matrix_shape(flat[path].shape, axes) for path, axes in orientations.items()]
    if not shapes:
        raise InputError(
            f"delta.budget is {budget} and delta.targets names no kernel: name some, or set the budget to 0"
        )
    layers = [math.prod(stack) for *stack, _, _ in shapes]
    values = sum(layers) * config.nonzeros
    of_rank = sum(count * (rows + columns) for count, (*_, rows, columns) in zip(layers, shapes, strict=True))
    rank = int((budget * weights + 1e-6 - values) // of_rank)
    if rank < 1:
        least = math.ceil((values + of_rank) / weights * 1e6) / 1e6
        raise InputError(
            f"delta.budget is {budget}; rank 1 and {config.nonzeros} nonzeros on {sum(layers)} kernels need "
            f"{least:.6f} of the weights: give this much or more, or fewer targets or nonzeros"
        )
    return dataclasses.replace(config, rank=min(rank, *(min(shape[-2:]) for shape in shapes)))


def _targets(config: DeltaConfig, flat: Mapping[str, Array]) -> dict[str, str]:
    """Return the orientation of every target, by path, in the order of the tree."""
    stated: dict[str, tuple[str, str | None]] = {}
    for rule in config.targets:
        pattern, axes = (rule, None) if isinstance(rule, str) else (rule[0], rule[1]["orientation"])
        for path in tree.select([pattern], flat):
            earlier, other = stated.setdefault(path, (pattern, axes))
            if other != axes:
                raise InputError(
                    f"delta.targets {earlier!r} and {pattern!r} both match {path!r}, with the orientations {other} and "
                    f"{axes}: make one of them match other kernels only"
                )
    return {path: _checked(path, w, stated[path][1], config) for path, w in flat.items() if path in stated}


def _checked(path: str, w: Array, stated: str | None, config: DeltaConfig) -> str:
    """Return the orientation of a target."""
    if len(w.shape) < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(f"delta.targets matches {path!r}, which is {w.dtype}{w.shape}; expected a kernel (in, out)")
    axes = orientation.find(path, w.shape, stated)
    *_, rows, columns = orientation.matrix_shape(w.shape, axes)
    if not 0 <= config.rank <= min(rows, columns):
        raise InputError(f"delta.rank is {config.rank}; {path!r} is {rows} x {columns}: use 0 to {min(rows, columns)}")
    if not 0 <= config.nonzeros <= rows * columns:
        raise InputError(
            f"delta.nonzeros is {config.nonzeros}; {path!r} has {rows} x {columns} = {rows * columns} entries: use fewer"
        )
    return axes


def _keys(shapes: Mapping[str, tuple[int, ...]], key: Key) -> dict[str, Key]:
    """Return the keys (layers,) of every kernel; a kernel without a stack is one layer."""

    def layers(path: str, stack: Sequence[int]) -> list[str]:
        paths = stacks.paths(path, stack[0]) if len(stack) == 1 else [path]
        # Every other stack also needs one key per layer.
        return [f"{path}/{n:09}" for n in range(math.prod(stack))] if stack and paths == [path] else paths

    names = {path: layers(path, stack) for path, (*stack, _, _) in shapes.items()}
    order = tree.flatten(tree.unflatten({name: 0 for each in names.values() for name in each}))
    numbers = {name: number for number, name in enumerate(order)}
    return {
        path: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.array([numbers[name] for name in each]))
        for path, each in names.items()
    }


@jax.jit
def _split(keys: Key) -> Key:
    """Return the first new key of each of the keys (layers,)."""
    return jax.vmap(lambda each: jax.random.split(each, 1)[0])(keys)


def _pick(select: Callable[..., jax.Array], nonzeros: int, options: Mapping[str, Any], w: Array, key: Key) -> jax.Array:
    return select(w, nonzeros, key=key, **options)


def _supports(chosen: Mapping[str, Array], keys: Mapping[str, Key], config: DeltaConfig) -> dict[str, Array]:
    """Return the supports of matrices (stack..., in, out)."""
    select = SUPPORTS[config.support]
    options = {"rank": config.support_rank} if config.support == "grebsmo" else {}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for path, w in chosen.items():
        by_shape.setdefault(w.shape, []).append(path)
    supports: dict[str, Array] = {}
    pick = jax.vmap(functools.partial(_pick, select, config.nonzeros, options))

    def picked(kernels: Sequence[Array], keys: Sequence[Key]) -> jax.Array:
        """Return the supports (layers, nonzeros, 2) of all layers of kernels of one shape, by vmapped calls of chunks."""
        *_, rows, columns = kernels[0].shape
        stacked = jnp.concatenate([jnp.reshape(w, (-1, rows, columns)) for w in kernels])
        split = _split(jnp.concatenate(keys))
        chunk = max(1, _CHUNK_BYTES // (4 * rows * columns))
        parts = [slice(start, start + chunk) for start in range(0, len(stacked), chunk)]
        return jnp.concatenate([jax.block_until_ready(pick(stacked[part], split[part])) for part in parts])

    for shape, paths in by_shape.items():
        kernels, own_keys = [chosen[path] for path in paths], [keys[path] for path in paths]
        layers = math.prod(shape[:-2])
        of_shape = auto_sharded(picked, kernels, own_keys, out=((), (), ()))
        for number, path in enumerate(paths):
            part = of_shape[number * layers : (number + 1) * layers]
            supports[path] = part.reshape(*shape[:-2], config.nonzeros, 2)
    return supports
