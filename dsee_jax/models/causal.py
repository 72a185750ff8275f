"""The shared parts of the decoders: causal attention with a cache, the layers, and the heads of tasks."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Axes
from dsee_jax.models.cache import Cache, Context, last, read
from dsee_jax.models.layers import Bias, Dropout, JointDense, RmsNorm, init
from dsee_jax.models.rope import rotate
from dsee_jax.ops.barrier import fusion_barrier
from dsee_jax.ops.nn import softmax
from dsee_jax.stacks import STACK


class CausalLayer(nn.Module):
    """A layer of a decoder; a family adds ``__call__`` with the arguments of `skip`."""

    config: Any
    number: int

    @nn.nowrap
    def skip(
        self, x: jax.Array, context: Context, rotation: Any, cache: Mapping[str, jax.Array] | None, deterministic: bool
    ) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
        """Return the outputs where the layer is passed over: ``x``, and the cache as it is."""
        del context, rotation, deterministic
        return x, cache


class CausalAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245); params query, key, value, output, and query_norm, key_norm with norms.

    An attention without groups is the bias of its output, or zeros.
    """

    groups: int
    """Key/value heads; the query heads that read one group are adjacent."""
    per_group: int
    """Query heads per group."""
    head_size: int
    width: int
    scale: float
    """The factor of the scores."""
    window: int | None = None
    """The number of tokens that a token sees, itself included; None: all earlier tokens."""
    use_bias: bool = True
    use_output_bias: bool = True
    norm_epsilon: float | None = None
    """Epsilon of a root mean square norm of every query and key head; None: no norm."""
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
          context: of the call. A token that sees no key gets the mean of all values, never NaN.
          rotation: cosines and sines of the positions, see `dsee_jax.models.rope`; None: no rotation.
          cache: ``key`` and ``value`` of this layer, see `dsee_jax.models.cache`, or None.
          deterministic: no dropout of the attention weights.

        Returns:
          (batch, length, width), and the cache with the keys and values of ``x`` written.
        """
        if not self.groups:
            if self.norm_epsilon is not None:
                # All heads share the norms, so the norms stay when the heads are pruned.
                zeros = jnp.zeros((1, self.head_size), self.dtype)
                self.key_norm(self.query_norm(zeros))
            return (self.output(x) if self.use_output_bias else jnp.zeros_like(x)), cache
        shape = (*x.shape[:2], -1, self.head_size)
        query, key, value = (part.reshape(shape) for part in self.projections(x))
        if self.norm_epsilon is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        key, value = jnp.moveaxis(key, 1, 3), jnp.swapaxes(value, 1, 2)
        if cache is not None:
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(
                    cache[name],
                    new.reshape(*cache[name].shape[:-2], *new.shape[-2:]).astype(cache[name].dtype),
                    context.start,
                    axis=cache[name].ndim + axis,
                )
                for name, new, axis in (("key", key, -1), ("value", value, -2))
            }
            key, value = cache["key"].astype(self.dtype), cache["value"].astype(self.dtype)
        visible = context.visible
        if self.window is not None:
            visible &= context.distance < self.window
        batch, length = x.shape[:2]
        query = query.reshape(batch, length, self.groups, self.per_group, self.head_size)
        # All queries of a group are rows of one matrix, so both products read keys and values as they lie in the cache.
        rows = (*key.shape[:-2], self.per_group * length)
        query = jnp.moveaxis(query, 1, 3).reshape(*rows, self.head_size)
        scores = jnp.matmul(query, key, preferred_element_type=jnp.float32) * self.scale
        scores = scores.reshape(batch, self.groups, self.per_group, length, -1)
        weights = softmax(jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min))
        weights = self.dropout(weights, deterministic).astype(self.dtype)
        mixed = jnp.matmul(weights.reshape(*rows, -1), value)
        mixed = jnp.moveaxis(mixed.reshape(batch, self.groups, self.per_group, length, self.head_size), 3, 1)
        return self.output(mixed.reshape(*x.shape[:2], -1)), cache


class Decoder(nn.Module):
    """The layers in sequence: params ``layer_0``, ``layer_1`` ..., or with ``scan`` stacked as ``layers``."""

    layer: Callable[..., nn.Module]
    """``layer(number, name=...)`` returns a module ``(x, context, rotation, cache, deterministic) -> (x, cache)``."""
    depth: int
    scan: bool = False
    """Compile one layer and run it ``depth`` times; all layers must be alike."""
    remat: bool = False
    """Recompute the inside of every layer in the backward pass, which saves memory (arXiv 1604.06174)."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: Context,
        rotation: tuple[jax.Array, jax.Array] | None,
        cache: Mapping[str, Any],
        deterministic: bool,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Return (batch, length, width) for ``x`` of that shape, and the cache (empty: none) with these tokens written."""
        cache = dict(cache)

        def run(
            layer: nn.Module, x: jax.Array, own: Any, context: Context, rotation: Any
        ) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
            return layer(x, context, rotation, own, deterministic)

        if self.remat:
            # A loop needs no barrier between its iterations.
            run = nn.remat(run, prevent_cse=not self.scan)
        if self.scan:
            axes: Any = (0, nn.broadcast, nn.broadcast)
            looped = nn.scan(
                run,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=axes,
                length=self.depth,
            )
            x, written = looped(self.layer(0, name=STACK), x, cache.get(STACK), context, rotation)
            return x, cache if written is None else cache | {STACK: written}
        for number in range(self.depth):
            name = f"layer_{number}"
            x, written = run(self.layer(number, name=name), fusion_barrier(x), cache.get(name), context, rotation)
            cache |= {} if written is None else {name: written}
        return x, cache


class CausalModel(nn.Module):
    """A decoder with the head of a task; an architecture defines ``parts`` and ``rotation``."""

    config: Any
    """With vocab_size, tie_word_embeddings, initializer_range, num_labels, dtype, uneven."""
    task: str = "causal-lm"
    scan: bool = False
    """Run the layers by ``jax.lax.scan``; their params are stacked, see `dsee_jax.stacks`."""
    remat: bool = False
    """Recompute the inside of every layer in the backward pass; only the outputs of layers stay in memory."""

    def parts(self) -> tuple[Any, Callable[..., nn.Module], int, Any]:
        """Return the module ``embeddings(input_ids, positions, deterministic)`` with ``attend(x)``, the factory of layers and
        their number (see `Decoder`), and the last ``norm(x)``."""
        raise NotImplementedError

    @property
    def position_table_size(self) -> int | None:
        """The size of the table of positions; None: there is no table."""
        return None

    def rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Return the rotation of queries and keys at ``positions`` (batch, length); None: no rotation."""
        return None

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
          input_ids: int (batch, length), below ``vocab_size``; an id outside gives NaN.
          attention_mask: int (batch, length): 0 = padding, else the number of the token's segment, `dsee_jax.models.cache`.
            None: all tokens, one segment per row.
          token_type_ids: accepted, as by every model, and ignored: there is no table of token types.
          positions: int (batch, length). None: counted from the first token of each segment.
          cache: the earlier tokens, from `dsee_jax.models.cache.create` or an earlier call.
          last_only: causal-lm: the logits of the last position only, (batch, 1, vocab_size).
          deterministic: no dropout. When false, pass ``rngs={"dropout": key}``.

        Returns:
          float32: logits (batch, length, vocab_size) of causal-lm; logits (batch, num_labels) at the last token of each row
          of sequence-classification; the last hidden state (batch, length, width) of features. With a cache: a pair of these
          outputs and the cache with these tokens written.

        Raises:
          InputError: the batch is longer than the table of positions, or ``scan`` is set and layers differ.
        """
        config, (embeddings, layer, depth, norm) = self.config, self.parts()
        if self.scan and config.uneven:
            raise InputError(f"layers that differ ({config.uneven}) cannot be scanned: set model.scan to false")
        context, written = read(input_ids, attention_mask, positions, cache)
        # A call of branches has a token of each branch, which may be more than there are positions.
        sequential, most = cache is None or "segments" in cache, self.position_table_size
        if sequential and most is not None and (length := input_ids.shape[1]) > most:
            raise InputError(
                f"the batch is {length} tokens long and the model has {most} positions: "
                "cut the examples (data.max_length)"
            )
        x = embeddings(input_ids, context.positions, deterministic)
        decoder = Decoder(layer, depth, self.scan, self.remat, name="decoder")
        x, written = decoder(x, context, self.rotation(context.positions), written, deterministic)
        if self.task == "sequence-classification":
            x = last(attention_mask, x)
        elif last_only:
            x = x[:, -1:]
        x = norm(x)

        def head(features: int, name: str) -> nn.Dense:
            dtype = jnp.dtype(config.dtype)
            return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init(config), name=name)

        if self.task == "sequence-classification":
            x = head(config.num_labels, "classifier")(x)
        elif self.task == "causal-lm":
            x = embeddings.attend(x) if config.tie_word_embeddings else head(config.vocab_size, "lm_head")(x)
        x = x.astype(jnp.float32)
        return x if cache is None else (x, written)


TASKS = {
    "sequence-classification": "ForSequenceClassification",
    "causal-lm": "ForCausalLM",
    "features": "Model",
}
"""Task -> the end of the name of Hugging Face's class."""

HEAD = (r"classifier/.*",)
"""The paths of the task head."""

TIED = ("lm_head/kernel", "embeddings/word/embedding")
"""`Architecture.tied` of the decoders."""

AXES: Axes = (
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
"""The rows of `Architecture.axes` that all decoders share."""
