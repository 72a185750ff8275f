"""The shared parts of the encoders: config fields, embeddings and layers (arXiv 1706.03762, section 3.1)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.models import hf_config
from dsee_jax.models.layers import ACTIVATIONS, Attention, Dropout, LayerNorm, Mlp, init
from dsee_jax.ops.barrier import fusion_barrier


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of ``config.json`` under Hugging Face's names and defaults.

    ``kept_heads``, ``kept_neurons`` and ``kept_head_size`` are our own; the run sets ``num_labels`` and ``dtype``.

    Raises:
      InputError: a size below 1, a rate outside [0, 1), heads that do not divide the width, kept widths that are not one
        number per layer or exceed the unpruned width, an activation or dtype that is not implemented.
    """

    model_type = ""
    """Hugging Face's name of the kind of model, set by the subclasses."""
    SIZES: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "type_vocab_size", "num_labels"),
    )
    """Fields that are positive whole numbers."""
    DROPOUTS: ClassVar[tuple[str, ...]] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    """Fields that are dropout rates."""
    LAYERED: ClassVar[tuple[str, ...]] = ("kept_heads", "kept_neurons")
    """Fields with one value for each layer, or None."""
    OPTIONS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "dtype": ("float32", "bfloat16"),
    }
    """The allowed values of a field."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    kept_heads: tuple[int, ...] | None = None
    """Heads of each layer of a structurally pruned model, each of size `head_size`. None: all."""
    kept_neurons: tuple[int, ...] | None = None
    """Feed-forward neurons of each layer of a structurally pruned model. None: intermediate_size in each."""
    kept_head_size: int | None = None
    """Entries of a head of a model whose hidden width was pruned. None: hidden_size / num_attention_heads."""
    num_labels: int = 2
    """Columns of a classifier; 1 for regression."""
    dtype: str = "float32"
    """float32 or bfloat16: of the matrix products; params are float32."""

    def __post_init__(self) -> None:
        dropouts = tuple(name for name in self.DROPOUTS if getattr(self, name) is not None)
        sizes = self.SIZES if self.kept_head_size is None else (*self.SIZES, "kept_head_size")
        hf_config.check(self, sizes=sizes, rates=(*dropouts, "layer_norm_eps", "initializer_range"))
        if self.kept_head_size is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"'hidden_size' is {self.hidden_size}, not a multiple of 'num_attention_heads' = {self.num_attention_heads}"
            )
        hf_config.check_widths(self, "kept_heads", self.num_hidden_layers, self.num_attention_heads)
        hf_config.check_widths(self, "kept_neurons", self.num_hidden_layers, self.intermediate_size)
        for name, options in self.OPTIONS.items():
            if (value := getattr(self, name)) not in options:
                near = did_you_mean(str(value), map(str, options))
                raise InputError(f"{name!r} is {value!r}{near}; implemented: {', '.join(map(str, options))}")

    @classmethod
    def fixed(cls, config: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """Return the fields of a ``config.json`` that are not implemented, with the values that change nothing."""
        return {"is_decoder": (False, None), "embedding_size": (config.get("hidden_size"), None)}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> Self:
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype. Raises `InputError` as `hf_config.read` does."""
        return hf_config.read(cls, config, fixed=cls.fixed(config), **run)

    def with_dropout(self, rate: float) -> Self:
        """Return this config with every dropout rate set to ``rate``, in [0, 1)."""
        return dataclasses.replace(self, **dict.fromkeys(self.DROPOUTS, rate))

    @property
    def head_size(self) -> int:
        """Entries of a head; pruning other heads, or the hidden width, does not change it."""
        return self.kept_head_size or self.hidden_size // self.num_attention_heads

    @property
    def own_width(self) -> bool:
        """Whether the standard fields cannot hold the size of the heads beside the hidden width."""
        return self.kept_head_size is not None

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input; None: no limit."""
        return self.max_position_embeddings

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The number of units of each kind (``heads``, ``neurons``) in every layer."""
        return {
            "heads": self.kept_heads or (self.num_attention_heads,) * self.num_hidden_layers,
            "neurons": self.kept_neurons or (self.intermediate_size,) * self.num_hidden_layers,
        }

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> Self:
        """Return this config with these numbers of units in every layer; None: the numbers of the standard fields.

        An equal number of neurons in all layers becomes ``intermediate_size``. No standard field gives the size of a head: an
        equal number of heads becomes ``num_attention_heads`` where the heads fill the hidden width.
        """
        width = hf_config.standard_width(neurons, self.intermediate_size)
        number, size = hf_config.divided_heads(heads, self.num_attention_heads, self.head_size, self.hidden_size)
        return dataclasses.replace(
            self,
            intermediate_size=width,
            num_attention_heads=number,
            kept_heads=hf_config.kept_widths(heads, number),
            kept_neurons=hf_config.kept_widths(neurons, width),
            kept_head_size=size,
        )

    def with_hidden(self, size: int) -> Self:
        """Return this config with ``size`` entries of the hidden state, and heads of the size that they have."""
        return dataclasses.replace(self, hidden_size=size, kept_head_size=self.head_size)

    def with_layers(self, kept: Sequence[bool]) -> Self:
        """Return this config with the layers of ``kept`` (layers,), True = kept, renumbered."""
        return dataclasses.replace(
            self,
            num_hidden_layers=int(sum(kept)),
            **{name: hf_config.of_layers(getattr(self, name), kept) for name in self.LAYERED},
        )


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    config: Config

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array | None,
        token_types: jax.Array | None,
        deterministic: bool,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Return (batch, length, width).

        Args:
          input_ids: int (batch, length).
          positions: int (batch or 1, length); None: the model has no such table.
          token_types: int (batch, length); None: the model has no such table.
          deterministic: no dropout.
          mask: (batch, length), 0 sets the result to 0 at that position. None: no position is set to 0.
        """
        config, length = self.config, input_ids.shape[1]
        if config.longest is not None and length > config.longest:
            raise InputError(
                f"the batch is {length} tokens long and the model has {config.longest} positions: "
                "cut the examples (data.max_length)"
            )

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, config.hidden_size, embedding_init=init(config), name=name)

        x = table(config.vocab_size, "word")(input_ids)
        if token_types is not None:
            x = x + table(config.type_vocab_size, "token_type")(token_types)
        if positions is not None:
            x = x + table(config.max_position_embeddings, "position")(positions)
        x = LayerNorm(config.layer_norm_eps, jnp.dtype(config.dtype), name="norm")(x)
        if mask is not None:
            x = jnp.where((mask != 0)[..., None], x, 0)
        return Dropout(config.hidden_dropout_prob)(x, deterministic)


def attention(config: Config, number: int, kind: Callable[..., Attention] = Attention, **more: Any) -> Attention:
    """Return the attention of layer ``number``: ``kind`` takes the fields of `Attention`, and ``more``."""
    return kind(
        config.widths["heads"][number],
        config.head_size,
        config.attention_probs_dropout_prob,
        jnp.dtype(config.dtype),
        init(config),
        config.hidden_size,
        **more,
        name="attention",
    )


class Layer(nn.Module):
    """Attention, then the feed-forward pair; each is added to its input and the sum normalised."""

    config: Config
    number: int
    make: Callable[[Any, int], Attention] = attention

    @nn.nowrap
    def skip(
        self, x: jax.Array, mask: jax.Array, deterministic: bool, first: int | None = None, *context: jax.Array
    ) -> jax.Array:
        """Return the output where the layer is passed over: the first ``first`` positions of ``x``."""
        del mask, deterministic, context
        return x[:, :first]

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, deterministic: bool, first: int | None = None, *context: jax.Array
    ) -> jax.Array:
        """Return (batch, first, width) for ``x`` (batch, length, width), with a bool ``mask`` (batch, heads, length, length).

        Only the first ``first`` positions are computed; each of them sees every position of ``x``. None: all positions.
        ``context`` is passed to the attention.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        y = self.make(config, self.number)(x, mask, deterministic, first, *context)
        y = Dropout(config.hidden_dropout_prob)(y, deterministic)
        x = LayerNorm(config.layer_norm_eps, dtype, name="attention_norm")(x[:, :first] + y)
        neurons = config.widths["neurons"][self.number]
        y = Mlp(neurons, config.hidden_act, dtype, init(config), name="mlp")(x)
        y = Dropout(config.hidden_dropout_prob)(y, deterministic)
        return LayerNorm(config.layer_norm_eps, dtype, name="mlp_norm")(x + y)


class Encoder(nn.Module):
    """The layers in sequence."""

    config: Config
    make: Callable[[Any, int], Attention] = attention

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, deterministic: bool, first: int | None = None, *context: jax.Array
    ) -> jax.Array:
        """Return (batch, first, width), arguments as of `Layer`.

        Only the last layer stops at the first ``first`` positions (None: all): every other layer feeds the next one.
        """
        last = self.config.num_hidden_layers - 1
        for number in range(last + 1):
            layer = Layer(self.config, number, self.make, name=f"layer_{number}")
            x = layer(fusion_barrier(x), mask, deterministic, first if number == last else None, *context)
        return x
