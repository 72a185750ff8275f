"""RankMean (ACL 2024 Findings): coefficients from the ranks of each unit's change within its own model, without data.

    rank_m(u) = rank of sum |t_m - t0| over the tensors of unit u, among the units of model m, 1 = changed least
    c_m(u)    = rank_m(u) / sum_k rank_k(u)               ascending, the paper's
    c_m(u)   ~= 1 / (U + 1 - rank_m(u))                    reversed, normalised over the models

The authors' code breaks ties by the order of the units; here tied units share their mean rank unless ``ties`` is ``order``.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from dsee_jax.aliases import Array


def ranks(scores: Array, *, descending: bool = False, ties: Literal["mean", "order"] = "mean") -> jax.Array:
    """Return the ranks (units,) float32, from 1, of ``scores`` (units,); ``descending`` gives the largest rank 1."""
    scores = jnp.asarray(scores)
    across, down = scores[None, :], scores[:, None]
    before = (across > down) if descending else (across < down)
    equal = across == down
    if ties == "order":
        position = jnp.arange(scores.shape[0])
        return jnp.sum(before | (equal & (position[None, :] <= position[:, None])), axis=1).astype(jnp.float32)
    return jnp.sum(before, axis=1) + (jnp.sum(equal, axis=1) + 1) / jnp.float32(2)


def coefficients(
    scores: Array,
    *,
    order: Literal["ascending", "reversed"] = "ascending",
    ties: Literal["mean", "order"] = "mean",
) -> jax.Array:
    """Return the coefficients (models, units), each column summing to 1, of the changes ``scores`` (models, units)."""
    found = jax.vmap(lambda row: ranks(row, descending=order == "reversed", ties=ties))(jnp.asarray(scores))
    share = 1 / found if order == "reversed" else found
    return share / jnp.sum(share, axis=0, keepdims=True)
