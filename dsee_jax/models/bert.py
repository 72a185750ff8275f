"""BERT (arXiv 1810.04805) in plain Linen, numerically Hugging Face's ``BertModel``; MiniLM encoders are the same model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.layout import KERNEL, PLAIN, Layout
from dsee_jax.models import fields
from dsee_jax.models.layers import ACTIVATIONS, Attention, Dropout, LayerNorm, Mlp

_FIXED = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of ``config.json`` under Hugging Face's names and defaults, two of our own, then two that the run decides.

    Raises:
      InputError: a size below 1, a rate outside [0, 1), heads that do not divide the width, kept widths that are not one a
        layer or more than there are, an activation or dtype that is not implemented.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    """None: hidden_dropout_prob."""
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
    """Columns of the classifier; 1 for regression."""
    dtype: str = "float32"
    """float32 or bfloat16: of the matrix products; params are float32."""

    def __post_init__(self) -> None:
        fields.check(
            self,
            sizes=(
                *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
                *("max_position_embeddings", "type_vocab_size", "num_labels"),
            ),
            rates=("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps", "initializer_range")
            + (() if self.classifier_dropout is None else ("classifier_dropout",)),
        )
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"'hidden_size' is {self.hidden_size}, not a multiple of 'num_attention_heads' = {self.num_attention_heads}"
            )
        fields.check_widths(self, "kept_heads", self.num_hidden_layers, self.num_attention_heads)
        fields.check_widths(self, "kept_neurons", self.num_hidden_layers, self.intermediate_size)
        for name, options in (("hidden_act", tuple(ACTIVATIONS)), ("dtype", ("float32", "bfloat16"))):
            if (value := getattr(self, name)) not in options:
                near = did_you_mean(str(value), options)
                raise InputError(f"{name!r} is {value!r}{near}; implemented: {', '.join(options)}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> "Config":
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype. Raises `InputError` as `fields.read` does."""
        return fields.read(cls, config, fixed=_FIXED, **run)

    def with_dropout(self, rate: float) -> "Config":
        """Return this config with every dropout rate set to ``rate``, in [0, 1)."""
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        return dataclasses.replace(self, **dict.fromkeys(names, rate))

    @property
    def head_size(self) -> int:
        """Entries of a head, whether others were cut or not."""
        return self.hidden_size // self.num_attention_heads

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """How many units of each kind of `CUTS` every layer has."""
        return {
            "heads": self.kept_heads or (self.num_attention_heads,) * self.num_hidden_layers,
            "neurons": self.kept_neurons or (self.intermediate_size,) * self.num_hidden_layers,
        }

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> "Config":
        """Return this config with so many units in every layer; None: as many as before any cut."""

        def kept(widths: Sequence[int] | None, whole: int) -> tuple[int, ...] | None:
            return None if widths is None or set(widths) == {whole} else tuple(widths)

        heads, neurons = kept(heads, self.num_attention_heads), kept(neurons, self.intermediate_size)
        return dataclasses.replace(self, kept_heads=heads, kept_neurons=neurons)


def _init(config: Config) -> Any:
    return nn.initializers.normal(config.initializer_range)


class Embeddings(nn.Module):
    """Sum of word, position and token-type embeddings, normalised."""

    config: Config

    @nn.compact
    def __call__(self, input_ids: jax.Array, token_type_ids: jax.Array, deterministic: bool) -> jax.Array:
        """Return (batch, length, width) for ids (batch, length)."""
        config, length = self.config, input_ids.shape[1]
        if length > config.max_position_embeddings:
            raise InputError(
                f"the batch is {length} tokens long and the model has {config.max_position_embeddings} positions: "
                "cut the examples (data.max_length)"
            )

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, config.hidden_size, embedding_init=_init(config), name=name)

        x = (
            table(config.vocab_size, "word")(input_ids)
            + table(config.type_vocab_size, "token_type")(token_type_ids)
            + table(config.max_position_embeddings, "position")(jnp.arange(length)[None])
        )
        x = LayerNorm(config.layer_norm_eps, jnp.dtype(config.dtype), name="norm")(x)
        return Dropout(config.hidden_dropout_prob)(x, deterministic)


class Layer(nn.Module):
    """Attention, then the feed-forward pair; each is added to its input and the sum normalised."""

    config: Config
    number: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool, kept: int | None = None) -> jax.Array:
        """Return (batch, kept, width) for ``x`` (batch, length, width) and a bool ``mask`` (batch, 1, 1, length).

        ``kept``: the first so many positions are computed, all of which see every position of ``x``; None: all.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        attention = Attention(
            config.widths["heads"][self.number],
            config.head_size,
            config.attention_probs_dropout_prob,
            dtype,
            _init(config),
            config.hidden_size,
            name="attention",
        )
        y = Dropout(config.hidden_dropout_prob)(attention(x, mask, deterministic, kept), deterministic)
        x = LayerNorm(config.layer_norm_eps, dtype, name="attention_norm")(x[:, :kept] + y)
        neurons = config.widths["neurons"][self.number]
        y = Mlp(neurons, config.hidden_act, dtype, _init(config), name="mlp")(x)
        y = Dropout(config.hidden_dropout_prob)(y, deterministic)
        return LayerNorm(config.layer_norm_eps, dtype, name="mlp_norm")(x + y)


class Encoder(nn.Module):
    """The layers, one after the other."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool, kept: int | None = None) -> jax.Array:
        """Return (batch, kept, width) for ``x`` (batch, length, width) and a bool ``mask`` (batch, 1, 1, length).

        Only the last layer stops at the first ``kept`` positions (None: all): the others are read by the next.
        """
        last = self.config.num_hidden_layers - 1
        for number in range(last + 1):
            layer = Layer(self.config, number, name=f"layer_{number}")
            x = layer(x, mask, deterministic, kept if number == last else None)
        return x


class Bert(nn.Module):
    """BERT with the head of a task (`ARCHITECTURES` lists them)."""

    config: Config
    task: str = "sequence-classification"

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Run the model.

        Args:
          input_ids: int (batch, length), below ``vocab_size``; one outside gives NaN.
          attention_mask: (batch, length), nonzero = a token, 0 = padding. None: all tokens.
          token_type_ids: int (batch, length), below ``type_vocab_size``. None: zeros.
          deterministic: no dropout. When false, pass ``rngs={"dropout": key}``.

        Returns:
          float32: logits (batch, num_labels) of sequence-classification; the last hidden state (batch, length, width) of
          features.

        Raises:
          InputError: the batch is longer than ``max_position_embeddings``.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = Embeddings(config, name="embeddings")(input_ids, types, deterministic)
        # A classifier reads the first position only.
        kept = 1 if self.task == "sequence-classification" else None
        x = Encoder(config, name="encoder")(x, (mask != 0)[:, None, None, :], deterministic, kept)
        if self.task == "features":
            return x.astype(jnp.float32)
        pooler = nn.Dense(config.hidden_size, dtype=dtype, kernel_init=_init(config), name="pooler")
        classifier = nn.Dense(config.num_labels, dtype=dtype, kernel_init=_init(config), name="classifier")
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        return classifier(Dropout(rate)(jnp.tanh(pooler(x[:, 0])), deterministic)).astype(jnp.float32)


Model = Bert

ARCHITECTURES = {"sequence-classification": "BertForSequenceClassification", "features": "BertModel"}
"""Task -> Hugging Face's class."""

HEAD = (r"pooler/.*", r"classifier/.*")
"""Paths that a task brings with it; created where a checkpoint lacks them."""

PREFIX = "bert."
"""Of every name but the classifier's; files of a bare ``BertModel`` lack it."""

_LAYER = (
    ("attention/query", "attention.self.query"),
    ("attention/key", "attention.self.key"),
    ("attention/value", "attention.self.value"),
    ("attention/output", "attention.output.dense"),
    ("mlp/up", "intermediate.dense"),
    ("mlp/down", "output.dense"),
)
_DENSE = (
    *((f"encoder/layer_{{i}}/{ours}", f"bert.encoder.layer.{{i}}.{theirs}") for ours, theirs in _LAYER),
    ("pooler", "bert.pooler.dense"),
    ("classifier", "classifier"),
)
_NORM = (
    ("embeddings/norm", "bert.embeddings.LayerNorm"),
    ("encoder/layer_{i}/attention_norm", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
    ("encoder/layer_{i}/mlp_norm", "bert.encoder.layer.{i}.output.LayerNorm"),
)

HF_NAMES: tuple[tuple[str, str, Layout], ...] = (
    ("embeddings/word/embedding", "bert.embeddings.word_embeddings.weight", PLAIN),
    ("embeddings/position/embedding", "bert.embeddings.position_embeddings.weight", PLAIN),
    ("embeddings/token_type/embedding", "bert.embeddings.token_type_embeddings.weight", PLAIN),
    *((f"{ours}/kernel", f"{theirs}.weight", KERNEL) for ours, theirs in _DENSE),
    *((f"{ours}/bias", f"{theirs}.bias", PLAIN) for ours, theirs in _DENSE + _NORM),
    *((f"{ours}/scale", f"{theirs}.weight", PLAIN) for ours, theirs in _NORM),
)
"""(our path, Hugging Face's name, how the one stands in the other); ``{i}`` is the number of the layer in both."""

OLD_NAMES = ((r"(.*\.LayerNorm)\.gamma", r"\1.weight"), (r"(.*\.LayerNorm)\.beta", r"\1.bias"))
"""(regex, replacement) for names that checkpoints converted from TensorFlow have."""

IGNORED_NAMES = (r"(.*\.)?position_ids", r"cls\..*")
"""Names that hold nothing of the model: a constant 0, 1, 2 ..., and the heads of the pretraining."""

AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embeddings/word/embedding", ("vocab", "embed")),
    (r"embeddings/(position|token_type)/embedding", (None, "embed")),
    (r"(.*/)?(norm|attention_norm|mlp_norm)/(scale|bias)", ("embed",)),
    (r".*/attention/(query|key|value)/kernel", ("embed", "heads")),
    (r".*/attention/(query|key|value)/bias", ("heads",)),
    (r".*/attention/output/kernel", ("heads", "embed")),
    (r".*/mlp/up/kernel", ("embed", "mlp")),
    (r".*/mlp/up/bias", ("mlp",)),
    (r".*/mlp/down/kernel", ("mlp", "embed")),
    (r".*/(attention/output|mlp/down)/bias", ("embed",)),
    (r"(pooler|classifier)/kernel", ("embed", None)),
    (r"(pooler|classifier)/bias", (None,)),
)
"""(regex over whole paths, the logical name of each axis); None: an axis that nothing shares. The last two are the head's."""

_INNER = tuple(f"encoder/layer_{{i}}/attention/{name}" for name in ("query", "key", "value"))

CUTS: dict[str, dict[str, Any]] = {
    "heads": {
        "axes": (
            *((f"{path}/kernel", 1, "head_size") for path in _INNER),
            *((f"{path}/bias", 0, "head_size") for path in _INNER),
            ("encoder/layer_{i}/attention/output/kernel", 0, "head_size"),
        ),
        "scored": ("encoder/layer_{i}/attention/query/kernel", "encoder/layer_{i}/attention/value/kernel"),
    },
    "neurons": {
        "axes": (
            ("encoder/layer_{i}/mlp/up/kernel", 1, 1),
            ("encoder/layer_{i}/mlp/up/bias", 0, 1),
            ("encoder/layer_{i}/mlp/down/kernel", 0, 1),
        ),
        "scored": ("encoder/layer_{i}/mlp/up/kernel",),
    },
}
"""By kind of unit, for every layer ``{i}``. ``axes``: (path, axis, entries), what is cut together; the axis is the units one
after the other, each of so many entries (a number, or the field of the config that says it). ``scored``: the kernels whose
columns of a unit make its score."""
