"""What the encoders share: the fields of their config, embeddings and layers (arXiv 1706.03762, section 3.1)."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.models import hf_config
from dsee_jax.models.layers import ACTIVATIONS, Attention, Dropout, LayerNorm, Mlp


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of ``config.json`` under Hugging Face's names and defaults, two of our own, then two that the run decides.

    Raises:
      InputError: a size below 1, a rate outside [0, 1), heads that do not divide the width, kept widths that are not one a
        layer or more than there are, an activation or dtype that is not implemented.
    """

    model_type: ClassVar[str]
    SIZES: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "type_vocab_size", "num_labels"),
    )
    """Fields that are whole numbers from 1."""
    DROPOUTS: ClassVar[tuple[str, ...]] = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    """Fields that are dropout rates."""
    OPTIONS: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "hidden_act": tuple(ACTIVATIONS),
        "dtype": ("float32", "bfloat16"),
    }
    """The values that a field may have."""

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
    """Heads of each layer of a model that was cut; their size stays hidden_size / num_attention_heads. None: all."""
    kept_neurons: tuple[int, ...] | None = None
    """Feed-forward neurons of each layer of a model that was cut. None: intermediate_size in each."""
    num_labels: int = 2
    """Columns of a classifier; 1 for regression."""
    dtype: str = "float32"
    """float32 or bfloat16: of the matrix products; params are float32."""

    def __post_init__(self) -> None:
        given = tuple(name for name in self.DROPOUTS if getattr(self, name) is not None)
        hf_config.check(self, sizes=self.SIZES, rates=(*given, "layer_norm_eps", "initializer_range"))
        if self.hidden_size % self.num_attention_heads:
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
        """Return what of a ``config.json`` is not implemented, with the values under which it changes nothing."""
        del config
        return {"is_decoder": (False, None), "add_cross_attention": (False, None)}

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> Self:
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype. Raises `InputError` as `fields.read` does."""
        return hf_config.read(cls, config, fixed=cls.fixed(config), **run)

    def with_dropout(self, rate: float) -> Self:
        """Return this config with every dropout rate set to ``rate``, in [0, 1)."""
        return dataclasses.replace(self, **dict.fromkeys(self.DROPOUTS, rate))

    @property
    def head_size(self) -> int:
        """Entries of a head, whether others were cut or not."""
        return self.hidden_size // self.num_attention_heads

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input; None: no limit."""
        return self.max_position_embeddings

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """How many units of each kind of CUTS every layer has."""
        return {
            "heads": self.kept_heads or (self.num_attention_heads,) * self.num_hidden_layers,
            "neurons": self.kept_neurons or (self.intermediate_size,) * self.num_hidden_layers,
        }

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> Self:
        """Return this config with so many units in every layer; None: as many as before any cut."""

        def kept(widths: Sequence[int] | None, whole: int) -> tuple[int, ...] | None:
            return None if widths is None or set(widths) == {whole} else tuple(widths)

        heads, neurons = kept(heads, self.num_attention_heads), kept(neurons, self.intermediate_size)
        return dataclasses.replace(self, kept_heads=heads, kept_neurons=neurons)


def init(config: Config) -> Any:
    """Return the initializer of kernels and tables."""
    return nn.initializers.normal(config.initializer_range)


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
          mask: (batch, length), 0 where the result is 0. None: nowhere.
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
    """Return the attention of layer ``number``, of a class that takes what `Attention` takes, and ``more``."""
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

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, deterministic: bool, kept: int | None = None, *context: jax.Array
    ) -> jax.Array:
        """Return (batch, kept, width) for ``x`` (batch, length, width) and a bool ``mask`` for (batch, heads, length, length).

        ``kept``: the first so many positions are computed, all of which see every position of ``x``; None: all. ``context``
        is the attention's.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        y = self.make(config, self.number)(x, mask, deterministic, kept, *context)
        y = Dropout(config.hidden_dropout_prob)(y, deterministic)
        x = LayerNorm(config.layer_norm_eps, dtype, name="attention_norm")(x[:, :kept] + y)
        neurons = config.widths["neurons"][self.number]
        y = Mlp(neurons, config.hidden_act, dtype, init(config), name="mlp")(x)
        y = Dropout(config.hidden_dropout_prob)(y, deterministic)
        return LayerNorm(config.layer_norm_eps, dtype, name="mlp_norm")(x + y)


class Encoder(nn.Module):
    """The layers, one after the other."""

    config: Config
    make: Callable[[Any, int], Attention] = attention

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, deterministic: bool, kept: int | None = None, *context: jax.Array
    ) -> jax.Array:
        """Return (batch, kept, width), arguments as of `Layer`.

        Only the last layer stops at the first ``kept`` positions (None: all): the others are read by the next.
        """
        last = self.config.num_hidden_layers - 1
        for number in range(last + 1):
            layer = Layer(self.config, number, self.make, name=f"layer_{number}")
            x = layer(x, mask, deterministic, kept if number == last else None, *context)
        return x
