"""What decoders share: attention to earlier tokens only, with a cache, and the heads of their tasks."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax import ops
from dsee_jax.models import cache as caches
from dsee_jax.models.cache import Cache, Context
from dsee_jax.models.layers import Bias, Dropout, JointDense, RmsNorm
from dsee_jax.models.rope import rotate


class CausalAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); params query, key, value, output, and query_norm, key_norm where asked.

    Without groups it is the bias of its output, or nothing.
    """

    groups: int
    """Heads of keys and values; those of queries that read group g stand side by side."""
    per_group: int
    """Query heads of a group."""
    head_size: int
    width: int
    scale: float
    """Of the scores."""
    window: int | None = None
    """A token sees so many tokens, itself included; None: all before it."""
    use_bias: bool = True
    use_output_bias: bool = True
    norm_epsilon: float | None = None
    """Of a root mean square norm of every query and key head; None: no norm."""
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    def setup(self) -> None:
        """Declare the projections; sharing the scope puts their params at ``query``, not ``projections/query``."""
        if self.norm_epsilon is not None:
            self.query_norm = RmsNorm(self.norm_epsilon, self.dtype)
            self.key_norm = RmsNorm(self.norm_epsilon, self.dtype)
        if not self.groups:
            if self.use_output_bias:
                self.output = Bias(self.width, self.dtype)
            return
        inner = self.groups * self.head_size
        names, widths = ("query", "key", "value"), (inner * self.per_group, inner, inner)
        unbiased = () if self.use_bias else names
        self.projections = JointDense(names, widths, self.dtype, self.kernel_init, unbiased)
        nn.share_scope(self, self.projections)
        self.output = nn.Dense(
            self.width, use_bias=self.use_output_bias, dtype=self.dtype, kernel_init=self.kernel_init
        )
        self.dropout = Dropout(self.dropout_rate)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        cache: Mapping[str, jax.Array] | None = None,
        deterministic: bool = True,
    ) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
        """Attend.

        Args:
          x: (batch, length, width).
          context: of the call. A token that may see nothing gets the mean of all values, never NaN.
          rotation: cosines and sines of its positions, `dsee_jax.models.rope`; None: positions are not turned in here.
          cache: ``key`` and ``value`` (batch, keys, groups, head size) of this layer, or None.
          deterministic: no dropout of the attention weights.

        Returns:
          (batch, length, width), and the cache with the keys and values of ``x`` written.
        """
        if not self.groups:
            if self.norm_epsilon is not None:
                # They are not cut with the heads: a norm is one for all of them.
                nothing = jnp.zeros((1, self.head_size), self.dtype)
                self.key_norm(self.query_norm(nothing))
            return (self.output(x) if self.use_output_bias else jnp.zeros_like(x)), cache
        shape = (*x.shape[:2], -1, self.head_size)
        query, key, value = (part.reshape(shape) for part in self.projections(x))
        if self.norm_epsilon is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            at = (0, context.start, 0, 0)
            cache = {
                name: jax.lax.dynamic_update_slice(cache[name], new.astype(cache[name].dtype), at)
                for name, new in (("key", key), ("value", value))
            }
            key, value = cache["key"].astype(self.dtype), cache["value"].astype(self.dtype)
        visible = context.visible
        if self.window is not None:
            visible &= context.distance < self.window
        query = query.reshape(*x.shape[:2], self.groups, self.per_group, self.head_size)
        scores = jnp.einsum("bqghd,bkgd->bghqk", query, key, preferred_element_type=jnp.float32) * self.scale
        weights = ops.softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min))
        weights = self.dropout(weights, deterministic).astype(self.dtype)
        mixed = jnp.einsum("bghqk,bkgd->bqghd", weights, value)
        return self.output(mixed.reshape(*x.shape[:2], -1)), cache


class CausalModel(nn.Module):
    """A decoder with the head of a task; an architecture says in ``stack`` what it is made of."""

    config: Any
    """With vocab_size, tie_word_embeddings, initializer_range, num_labels, dtype."""
    task: str = "causal-lm"

    def stack(self) -> tuple[Any, Any, Any]:
        """Return ``embeddings(input_ids, positions, deterministic)`` with ``attend(x)``, the layers ``decoder(x, context,
        cache, deterministic)`` and the last ``norm(x)``."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        deterministic: bool = True,
    ) -> Any:
        """Run the model.

        Args:
          input_ids: int (batch, length), below ``vocab_size``; one outside gives NaN.
          attention_mask: int (batch, length): 0 = padding, else the number of the token's segment, `dsee_jax.models.cache`.
            None: all tokens, one segment a row.
          token_type_ids: taken as every model does, and not read: there is no table of types.
          positions: int (batch, length). None: counted from the first token of each segment.
          cache: the tokens before these, from `dsee_jax.models.cache.create` or an earlier call.
          last_only: causal-lm: the logits of the last position only, (batch, 1, vocab_size).
          deterministic: no dropout. When false, pass ``rngs={"dropout": key}``.

        Returns:
          float32: logits (batch, length, vocab_size) of causal-lm; logits (batch, num_labels) at the last token of each row
          of sequence-classification; the last hidden state (batch, length, width) of features. With a cache a pair, the
          second being the cache with these tokens written.

        Raises:
          InputError: there is a table of positions and the batch is longer.
        """
        config, (embeddings, decoder, norm) = self.config, self.stack()
        context, written = caches.read(input_ids, attention_mask, positions, cache)
        x, written = decoder(embeddings(input_ids, context.positions, deterministic), context, written, deterministic)
        if self.task == "sequence-classification":
            x = caches.last(attention_mask, x)
        elif last_only:
            x = x[:, -1:]
        x = norm(x)

        def head(features: int, name: str) -> nn.Dense:
            init = nn.initializers.normal(config.initializer_range)
            return nn.Dense(features, use_bias=False, dtype=jnp.dtype(config.dtype), kernel_init=init, name=name)

        if self.task == "sequence-classification":
            x = head(config.num_labels, "classifier")(x)
        elif self.task == "causal-lm":
            x = embeddings.attend(x) if config.tie_word_embeddings else head(config.vocab_size, "lm_head")(x)
        x = x.astype(jnp.float32)
        return x if cache is None else (x, written)


AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embeddings/word/embedding", ("vocab", "embed")),
    (r"(.*/)?(norm|attention_norm|mlp_norm)/(scale|bias)", ("embed",)),
    (r".*/attention/(query|key|value)/kernel", ("embed", "heads")),
    (r".*/attention/(query|key|value)/bias", ("heads",)),
    (r".*/attention/output/kernel", ("heads", "embed")),
    (r".*/mlp/(gate|up)/kernel", ("embed", "mlp")),
    (r".*/mlp/(gate|up)/bias", ("mlp",)),
    (r".*/mlp/down/kernel", ("mlp", "embed")),
    (r".*/(attention/output|mlp/down)/bias", ("embed",)),
    (r"lm_head/kernel", ("embed", "vocab")),
    (r"classifier/kernel", ("embed", None)),
)
"""Of an architecture's AXES, the rows that all decoders have."""
