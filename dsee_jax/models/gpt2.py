"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"), numerically Hugging Face's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.hf_layout import KERNEL, PLAIN, Layout
from dsee_jax.models import causal, hf_config
from dsee_jax.models.cache import Context
from dsee_jax.models.causal import CausalAttention, CausalModel
from dsee_jax.models.layers import ACTIVATIONS, Dropout, LayerNorm, Mlp

_FIXED = {
    # Only the order of the operations differs, and scores are float32 here in any case.
    "reorder_and_upcast_attn": (False, True, None),
    "add_cross_attention": (False, None),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of ``config.json`` under Hugging Face's names and defaults, two of our own, then two that the run decides.

    Raises:
      InputError: a size below 1, a rate outside [0, 1), heads that do not divide the width, kept widths that are not one a
        layer or more than there are, an activation or dtype that is not implemented.
    """

    model_type: ClassVar[str] = "gpt2"

    vocab_size: int
    n_embd: int
    n_layer: int
    n_head: int
    n_positions: int = 1024
    n_inner: int | None = None
    """None: 4 n_embd."""
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    """Divide the scores by the root of a head's size."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Divide the scores of layer i, counted from 0, by i + 1."""
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    kept_heads: tuple[int, ...] | None = None
    """Heads of each layer of a model that was cut; their size stays n_embd / n_head. None: all."""
    kept_neurons: tuple[int, ...] | None = None
    """Feed-forward neurons of each layer of a model that was cut. None: n_inner in each."""
    num_labels: int = 2
    """Columns of the classifier; 1 for regression."""
    dtype: str = "float32"
    """float32 or bfloat16: of the matrix products."""

    def __post_init__(self) -> None:
        hf_config.check(
            self,
            sizes=("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "num_labels")
            + (() if self.n_inner is None else ("n_inner",)),
            rates=("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range"),
            flags=("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"),
        )
        if self.n_embd % self.n_head:
            raise InputError(f"'n_embd' is {self.n_embd}, not a multiple of 'n_head' = {self.n_head}")
        hf_config.check_widths(self, "kept_heads", self.n_layer, self.n_head)
        hf_config.check_widths(self, "kept_neurons", self.n_layer, self.neurons)
        for name, options in (("activation_function", tuple(ACTIVATIONS)), ("dtype", ("float32", "bfloat16"))):
            if (value := getattr(self, name)) not in options:
                near = did_you_mean(str(value), options)
                raise InputError(f"{name!r} is {value!r}{near}; implemented: {', '.join(options)}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> "Config":
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype. Raises `InputError` as `fields.read` does."""
        return hf_config.read(cls, config, fixed=_FIXED, **run)

    def with_dropout(self, rate: float) -> "Config":
        """Return this config with every dropout rate set to ``rate``, in [0, 1)."""
        return dataclasses.replace(self, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)

    type_vocab_size: ClassVar[int] = 0
    """There are no token types."""

    @property
    def longest(self) -> int | None:
        """The longest input; None: no limit."""
        return self.n_positions

    @property
    def neurons(self) -> int:
        """Feed-forward neurons of a layer before any cut."""
        return self.n_inner or 4 * self.n_embd

    @property
    def head_size(self) -> int:
        """Entries of a head, whether others were cut or not."""
        return self.n_embd // self.n_head

    @property
    def uneven(self) -> str:
        """In what layers differ, but for how they are numbered; empty: in nothing."""
        widths = [f"kept_{kind}" for kind, numbers in self.widths.items() if len(set(numbers)) > 1]
        return ", ".join(
            [*widths, *(["scale_attn_by_inverse_layer_idx"] if self.scale_attn_by_inverse_layer_idx else [])]
        )

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """How many units of each kind of `CUTS` every layer has."""
        return {
            "heads": self.kept_heads or (self.n_head,) * self.n_layer,
            "neurons": self.kept_neurons or (self.neurons,) * self.n_layer,
        }

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> "Config":
        """Return this config with so many units in every layer; None: as many as before any cut."""

        def kept(widths: Sequence[int] | None, whole: int) -> tuple[int, ...] | None:
            return None if widths is None or set(widths) == {whole} else tuple(widths)

        return dataclasses.replace(self, kept_heads=kept(heads, self.n_head), kept_neurons=kept(neurons, self.neurons))


def _init(config: Config) -> Any:
    return nn.initializers.normal(config.initializer_range)


class Embeddings(nn.Module):
    """Sum of word and position embeddings."""

    config: Config

    def setup(self) -> None:
        """Declare the tables."""
        config = self.config
        self.word = nn.Embed(config.vocab_size, config.n_embd, embedding_init=_init(config))
        self.position = nn.Embed(config.n_positions, config.n_embd, embedding_init=_init(config))
        self.dropout = Dropout(config.embd_pdrop)

    def __call__(self, input_ids: jax.Array, positions: jax.Array, deterministic: bool) -> jax.Array:
        """Return (batch, length, width) for ids and positions (batch, length); a position outside gives NaN."""
        if (length := input_ids.shape[1]) > self.config.n_positions:
            raise InputError(
                f"the batch is {length} tokens long and the model has {self.config.n_positions} positions: "
                "cut the examples (data.max_length)"
            )
        x = self.word(input_ids) + self.position(positions)
        return self.dropout(x, deterministic).astype(self.config.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Return (..., vocab_size), the products of ``x`` (..., width) with every row of the words."""
        return x @ self.word.embedding.T.astype(x.dtype)


class Layer(nn.Module):
    """Attention, then the feed-forward pair; each reads the normalised sum of all before it."""

    config: Config
    number: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: Context,
        rotation: None,
        cache: Mapping[str, jax.Array] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
        """Return (batch, length, width) for ``x`` of that shape, and the layer's cache with these tokens written."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        scale = config.head_size**-0.5 if config.scale_attn_weights else 1.0
        attention = CausalAttention(
            groups=config.widths["heads"][self.number],
            per_group=1,
            head_size=config.head_size,
            width=config.n_embd,
            scale=scale / (self.number + 1 if config.scale_attn_by_inverse_layer_idx else 1),
            dropout_rate=config.attn_pdrop,
            dtype=dtype,
            kernel_init=_init(config),
            name="attention",
        )
        y = LayerNorm(config.layer_norm_epsilon, dtype, name="attention_norm")(x)
        y, cache = attention(y, context, rotation, cache, deterministic)
        x = x + Dropout(config.resid_pdrop)(y, deterministic)
        y = LayerNorm(config.layer_norm_epsilon, dtype, name="mlp_norm")(x)
        neurons = config.widths["neurons"][self.number]
        y = Mlp(neurons, config.activation_function, dtype, _init(config), name="mlp")(y)
        return x + Dropout(config.resid_pdrop)(y, deterministic), cache


class Gpt2(CausalModel):
    """GPT-2 with the head of a task (`ARCHITECTURES` lists them)."""

    def parts(self) -> tuple[nn.Module, Callable[..., nn.Module], int, nn.Module]:
        """Return embeddings, what makes a layer, how many there are, and the last norm."""
        config = self.config
        norm = LayerNorm(config.layer_norm_epsilon, jnp.dtype(config.dtype), name="norm")
        return Embeddings(config, name="embeddings"), functools.partial(Layer, config), config.n_layer, norm


Model = Gpt2

ARCHITECTURES = {
    "sequence-classification": "GPT2ForSequenceClassification",
    "causal-lm": "GPT2LMHeadModel",
    "features": "GPT2Model",
}
"""Task -> Hugging Face's class."""

HEAD = (r"classifier/.*",)
"""Paths that a task brings with it; created where a checkpoint lacks them."""

PREFIX = "transformer."
"""Of every name but the heads'; files of a bare ``GPT2Model``, as the first that were released, lack it."""

_LAYER, _STORED = "decoder/layer_{i}", "transformer.h.{i}"
_DENSE = (("attention/output", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj"))
_NORM = (
    *((f"{_LAYER}/attention_norm", f"{_STORED}.ln_1"), (f"{_LAYER}/mlp_norm", f"{_STORED}.ln_2")),
    ("norm", "transformer.ln_f"),
)

HF_NAMES: tuple[tuple[str, str, Layout], ...] = (
    ("embeddings/word/embedding", "transformer.wte.weight", PLAIN),
    ("embeddings/position/embedding", "transformer.wpe.weight", PLAIN),
    *(
        (f"{_LAYER}/attention/{name}/{ours}", f"{_STORED}.attn.c_attn.{theirs}", Layout(part=part, parts=3))
        for part, name in enumerate(("query", "key", "value"))
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
    # Its Conv1D keeps kernels as (in, out), as we do.
    *((f"{_LAYER}/{ours}/kernel", f"{_STORED}.{theirs}.weight", PLAIN) for ours, theirs in _DENSE),
    *((f"{_LAYER}/{ours}/bias", f"{_STORED}.{theirs}.bias", PLAIN) for ours, theirs in _DENSE),
    *((f"{ours}/bias", f"{theirs}.bias", PLAIN) for ours, theirs in _NORM),
    *((f"{ours}/scale", f"{theirs}.weight", PLAIN) for ours, theirs in _NORM),
    ("lm_head/kernel", "lm_head.weight", KERNEL),
    ("classifier/kernel", "score.weight", KERNEL),
)
"""(our path, Hugging Face's name, how the one stands in the other); ``{i}`` is the number of the layer in both."""

OLD_NAMES: tuple[tuple[str, str], ...] = ()
"""(regex, replacement) for names that older checkpoints have."""

IGNORED_NAMES = (r"(.*\.)?attn\.(bias|masked_bias)", r"lm_head\.weight")
"""Names that hold nothing of the model: the causal mask, and the head over the vocabulary where the task or the tie needs
none."""

AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embeddings/position/embedding", (None, "embed")),
    *causal.AXES,
)
"""(regex over whole paths, the logical name of each axis); None: an axis that nothing shares."""

_INNER = tuple(f"{_LAYER}/attention/{name}" for name in ("query", "key", "value"))

CUTS: dict[str, dict[str, Any]] = {
    "heads": {
        "axes": (
            *((f"{path}/kernel", 1, "head_size") for path in _INNER),
            *((f"{path}/bias", 0, "head_size") for path in _INNER),
            (f"{_LAYER}/attention/output/kernel", 0, "head_size"),
        ),
        "scored": (f"{_LAYER}/attention/query/kernel", f"{_LAYER}/attention/value/kernel"),
    },
    "neurons": {
        "axes": (
            (f"{_LAYER}/mlp/up/kernel", 1, 1),
            (f"{_LAYER}/mlp/up/bias", 0, 1),
            (f"{_LAYER}/mlp/down/kernel", 0, 1),
        ),
        "scored": (f"{_LAYER}/mlp/up/kernel",),
    },
}
"""By kind of unit, for every layer ``{i}``. ``axes``: (path, axis, entries), what is cut together; the axis is the units one
after the other, each of so many entries (a number, or the field of the config that says it). ``scored``: the kernels whose
columns of a unit make its score."""
