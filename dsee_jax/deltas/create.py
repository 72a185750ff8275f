"""New updates of a pretrained tree: low-rank factors that start at zero, and supports chosen from each kernel."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsee_jax import stacks, tree
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas.supports import SUPPORTS
from dsee_jax.errors import InputError
from dsee_jax.typing import Array, Key, Params

_CHUNK_BYTES = 1 << 28
"""The most bytes of float32 kernels whose supports are chosen in one call: all query and value kernels of a RoBERTa-large. The
selectors make several copies of their input."""


def init(params: Params, config: DeltaConfig, *, key: Key) -> tuple[dict[str, Any], dict[str, Any]]:
    """Create the updates of every kernel that ``config.targets`` matches; the updated model still equals the pretrained model.

    ``a`` (in, rank) is normal with standard deviation 0.02. ``b`` (rank, out) and ``values`` (nonzeros,) are 0. Supports are
    chosen from the pretrained kernels. A stacked kernel (layers, in, out) of a scanned model gets stacked updates, equal to
    those of its layers as separate kernels.

    Args:
      params: the pretrained tree; targets must be floating kernels (in, out) or (layers, in, out).
      config: targets, rank, nonzeros, support.
      key: decides ``a`` and the random choices of the selectors; folded with the index of the kernel among the targets, every
        layer of a stacked kernel counted.

    Returns:
      ``(deltas, supports)``; both empty when rank and nonzeros are 0.

    Raises:
      InputError: a target matches nothing or an array that is no kernel, or rank or nonzeros are too large for a kernel.
    """
    if not config.rank and not config.nonzeros:
        return {}, {}
    flat = tree.flatten(params)
    chosen = {path: flat[path] for path in tree.select(config.targets, flat)}
    for path, w in chosen.items():
        _check(path, w, config)
    keys = _keys(chosen, key)
    deltas: dict[str, Array] = {}
    for path, w in chosen.items():
        *layers, rows, columns = w.shape
        if config.rank:
            normal = functools.partial(jax.random.normal, shape=(rows, config.rank), dtype=jnp.float32)
            a = 0.02 * jax.vmap(normal)(keys[path])
            deltas[f"{path}/a"] = a if layers else a[0]
            deltas[f"{path}/b"] = jnp.zeros((*layers, config.rank, columns), jnp.float32)
        if config.nonzeros:
            deltas[f"{path}/values"] = jnp.zeros((*layers, config.nonzeros), jnp.float32)
    supports = _supports(chosen, keys, config) if config.nonzeros else {}
    return tree.unflatten(deltas), tree.unflatten(supports)


def _keys(chosen: Mapping[str, Array], key: Key) -> dict[str, Key]:
    """Return the keys (layers,) of every kernel; a kernel (in, out) is one layer."""

    def layers(path: str, w: Array) -> list[str]:
        paths = stacks.paths(path, w.shape[0]) if w.ndim == 3 else [path]
        # A kernel that is stacked under another name than `stacks.STACK` also needs one key per layer.
        return [f"{path}/{n:09}" for n in range(w.shape[0])] if w.ndim == 3 and paths == [path] else paths

    names = {path: layers(path, w) for path, w in chosen.items()}
    order = tree.flatten(tree.unflatten({name: 0 for each in names.values() for name in each}))
    numbers = {name: number for number, name in enumerate(order)}
    return {
        path: jax.vmap(lambda n: jax.random.fold_in(key, n))(jnp.array([numbers[name] for name in each]))
        for path, each in names.items()
    }


def _check(path: str, w: Array, config: DeltaConfig) -> None:
    if w.ndim not in (2, 3) or not jnp.issubdtype(w.dtype, jnp.floating):
        raise InputError(f"delta.targets matches {path!r}, which is {w.dtype}{w.shape}; expected a kernel (in, out)")
    rows, columns = w.shape[-2:]
    if not 0 <= config.rank <= min(rows, columns):
        raise InputError(f"delta.rank is {config.rank}; {path!r} is {rows} x {columns}: use 0 to {min(rows, columns)}")
    if not 0 <= config.nonzeros <= rows * columns:
        raise InputError(
            f"delta.nonzeros is {config.nonzeros}; {path!r} has {rows} x {columns} = {rows * columns} entries: use fewer"
        )


def _pick(select: Callable[..., jax.Array], nonzeros: int, options: Mapping[str, Any], w: Array, key: Key) -> jax.Array:
    return select(w, nonzeros, key=key, **options)


def _supports(chosen: Mapping[str, Array], keys: Mapping[str, Key], config: DeltaConfig) -> dict[str, Array]:
    select = SUPPORTS[config.support]
    options = {"rank": config.support_rank} if config.support == "grebsmo" else {}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for path, w in chosen.items():
        by_shape.setdefault(w.shape, []).append(path)
    supports: dict[str, Array] = {}
    for shape, paths in by_shape.items():
        # All kernels of one shape, and all layers of stacked kernels, go through one vmapped call, in chunks.
        stacked = jnp.concatenate([jnp.reshape(chosen[path], (-1, *shape[-2:])) for path in paths])
        layers = stacked.shape[0] // len(paths)
        split = jax.vmap(lambda each: jax.random.split(each, 1)[0])(jnp.concatenate([keys[path] for path in paths]))
        pick = jax.vmap(functools.partial(_pick, select, config.nonzeros, options))
        chunk = max(1, _CHUNK_BYTES // (4 * shape[-2] * shape[-1]))
        parts = [slice(start, start + chunk) for start in range(0, len(stacked), chunk)]
        picked = jnp.concatenate([jax.block_until_ready(pick(stacked[part], split[part])) for part in parts])
        for number, path in enumerate(paths):
            part = picked[number * layers : (number + 1) * layers]
            supports[path] = part if len(shape) == 3 else part[0]
    return supports
