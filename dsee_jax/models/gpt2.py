"""GPT-2 (Radford et al. 2019, "Language models are unsupervised multitask learners"), numerically Hugging Face's."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.hf_layout import KERNEL, PLAIN, Layout
from dsee_jax.models import causal, hf_config
from dsee_jax.models.architecture import Architecture, standard_cuts
from dsee_jax.models.cache import Context
from dsee_jax.models.causal import CausalAttention, CausalLayer, CausalModel
from dsee_jax.models.layers import ACTIVATIONS, Dropout, LayerNorm, Mlp, init

_FIXED = {
    # The field only changes the order of operations; scores are float32 in this library in any case.
    "reorder_and_upcast_attn": (False, True, None),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of ``config.json`` under Hugging Face's names and defaults.

    ``kept_heads``, ``kept_neurons`` and ``kept_head_size`` are our own; the run sets ``num_labels`` and ``dtype``.

    Raises:
      InputError: a size below 1, a rate outside [0, 1), heads that do not divide the width, kept widths that are not one
        number per layer or exceed the unpruned width, an activation or dtype that is not implemented.
    """

    model_type = "gpt2"

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
    """Heads of each layer of a structurally pruned model, each of size `head_size`. None: all."""
    kept_neurons: tuple[int, ...] | None = None
    """Feed-forward neurons of each layer of a structurally pruned model. None: n_inner in each."""
    kept_head_size: int | None = None
    """Entries of a head of a model whose hidden width was pruned. None: n_embd / n_head."""
    num_labels: int = 2
    """Columns of the classifier; 1 for regression."""
    dtype: str = "float32"
    """float32 or bfloat16: of the matrix products."""

    def __post_init__(self) -> None:
        hf_config.check(
            self,
            sizes=(
                *("vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "num_labels"),
                *(name for name in ("n_inner", "kept_head_size") if getattr(self, name) is not None),
            ),
            rates=("resid_pdrop", "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range"),
            flags=("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings"),
        )
        if self.kept_head_size is None and self.n_embd % self.n_head:
            raise InputError(f"'n_embd' is {self.n_embd}, not a multiple of 'n_head' = {self.n_head}")
        hf_config.check_widths(self, "kept_heads", self.n_layer, self.n_head)
        hf_config.check_widths(self, "kept_neurons", self.n_layer, self.neurons)
        for name, options in (("activation_function", tuple(ACTIVATIONS)), ("dtype", ("float32", "bfloat16"))):
            if (value := getattr(self, name)) not in options:
                near = did_you_mean(str(value), options)
                raise InputError(f"{name!r} is {value!r}{near}; implemented: {', '.join(options)}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> Self:
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype. Raises `InputError` as `hf_config.read` does."""
        return hf_config.read(cls, config, fixed=_FIXED, **run)

    def with_dropout(self, rate: float) -> Self:
        """Return this config with every dropout rate set to ``rate``, in [0, 1)."""
        return dataclasses.replace(self, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)

    type_vocab_size = 0
    """The model has no token types."""

    @property
    def longest(self) -> int | None:
        """Tokens of the longest input; None: no limit."""
        return self.n_positions

    @property
    def neurons(self) -> int:
        """Feed-forward neurons of a layer, unless ``kept_neurons`` tells otherwise."""
        return self.n_inner or 4 * self.n_embd

    @property
    def hidden_size(self) -> int:
        """Entries of the hidden state of a token."""
        return self.n_embd

    @property
    def head_size(self) -> int:
        """Entries of a head; pruning other heads, or the hidden width, does not change it."""
        return self.kept_head_size or self.n_embd // self.n_head

    @property
    def own_width(self) -> bool:
        """Whether the standard fields cannot hold the size of the heads beside the hidden width."""
        return self.kept_head_size is not None

    @property
    def uneven(self) -> str:
        """The fields by which layers differ; empty: all layers are alike."""
        widths = [f"kept_{kind}" for kind, numbers in self.widths.items() if len(set(numbers)) > 1]
        return ", ".join(
            [*widths, *(["scale_attn_by_inverse_layer_idx"] if self.scale_attn_by_inverse_layer_idx else [])]
        )

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The number of units of each kind (``heads``, ``neurons``) in every layer."""
        return {
            "heads": self.kept_heads or (self.n_head,) * self.n_layer,
            "neurons": self.kept_neurons or (self.neurons,) * self.n_layer,
        }

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> Self:
        """Return this config with these numbers of units in every layer; None: the numbers of the standard fields.

        An equal number of neurons in all layers becomes ``n_inner``. No standard field gives the size of a head: an equal
        number of heads becomes ``n_head`` where the heads fill the hidden width.
        """
        width = hf_config.standard_width(neurons, self.neurons)
        number, size = hf_config.divided_heads(heads, self.n_head, self.head_size, self.n_embd)
        return dataclasses.replace(
            self,
            n_inner=self.n_inner if width == self.neurons else width,
            n_head=number,
            kept_heads=hf_config.kept_widths(heads, number),
            kept_neurons=hf_config.kept_widths(neurons, width),
            kept_head_size=size,
        )

    def with_hidden(self, size: int) -> Self:
        """Return this config with ``size`` entries of the hidden state, and heads of the size that they have."""
        return dataclasses.replace(self, n_embd=size, n_inner=self.neurons, kept_head_size=self.head_size)

    def with_layers(self, kept: Sequence[bool]) -> Self:
        """Return this config with the layers of ``kept`` (layers,), True = kept, renumbered.

        Raises:
          InputError: ``scale_attn_by_inverse_layer_idx`` is set, so that the number of a layer decides its scores.
        """
        if self.scale_attn_by_inverse_layer_idx and not all(kept):
            raise InputError(
                "'scale_attn_by_inverse_layer_idx' is true: the scores of a layer depend on its number, which changes where "
                "layers before it go; prune heads and neurons instead"
            )
        return dataclasses.replace(
            self,
            n_layer=int(sum(kept)),
            kept_heads=hf_config.of_layers(self.kept_heads, kept),
            kept_neurons=hf_config.of_layers(self.kept_neurons, kept),
        )


class Embeddings(nn.Module):
    """Sum of word and position embeddings."""

    config: Config

    def setup(self) -> None:
        """Declare the tables."""
        config = self.config
        self.word = nn.Embed(config.vocab_size, config.n_embd, embedding_init=init(config))
        self.position = nn.Embed(config.n_positions, config.n_embd, embedding_init=init(config))
        self.dropout = Dropout(config.embd_pdrop)

    def __call__(self, input_ids: jax.Array, positions: jax.Array, deterministic: bool) -> jax.Array:
        """Return (batch, length, width) for ids and positions (batch, length); a position outside the table gives NaN."""
        x = self.word(input_ids) + self.position(positions)
        return self.dropout(x, deterministic).astype(self.config.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Return (..., vocab_size), the products of ``x`` (..., width) with every row of the word table."""
        return x @ self.word.embedding.T.astype(x.dtype)


class Layer(CausalLayer):
    """Attention, then the feed-forward pair; each reads the normalised sum of all earlier outputs."""

    config: Config

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
            kernel_init=init(config),
            name="attention",
        )
        y = LayerNorm(config.layer_norm_epsilon, dtype, name="attention_norm")(x)
        y, cache = attention(y, context, rotation, cache, deterministic)
        x = x + Dropout(config.resid_pdrop)(y, deterministic)
        y = LayerNorm(config.layer_norm_epsilon, dtype, name="mlp_norm")(x)
        neurons = config.widths["neurons"][self.number]
        y = Mlp(neurons, config.activation_function, dtype, init(config), name="mlp")(y)
        return x + Dropout(config.resid_pdrop)(y, deterministic), cache


class Gpt2(CausalModel):
    """GPT-2 with the head of a task (`ARCHITECTURE.tasks` lists them)."""

    @property
    def position_table_size(self) -> int:
        """The size of the table of positions."""
        return self.config.n_positions

    def parts(self) -> tuple[nn.Module, Callable[..., nn.Module], int, nn.Module]:
        """Return the embeddings, the factory of layers, the number of layers and the last norm."""
        config = self.config
        norm = LayerNorm(config.layer_norm_epsilon, jnp.dtype(config.dtype), name="norm")
        return Embeddings(config, name="embeddings"), functools.partial(Layer, config), config.n_layer, norm


_LAYER, _STORED = "decoder/layer_{i}", "transformer.h.{i}"
_INNER = tuple(f"{_LAYER}/attention/{name}" for name in ("query", "key", "value"))
_DENSE = (("attention/output", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj"))
_NORM = (
    *((f"{_LAYER}/attention_norm", f"{_STORED}.ln_1"), (f"{_LAYER}/mlp_norm", f"{_STORED}.ln_2")),
    ("norm", "transformer.ln_f"),
)

ARCHITECTURE = Architecture(
    config=Config,
    model=Gpt2,
    model_types={"gpt2": "GPT2"},
    tasks=causal.TASKS | {"causal-lm": "LMHeadModel"},
    head=causal.HEAD,
    # The first checkpoints that were released lack the prefix too.
    prefix="transformer.",
    hf_names=(
        ("embeddings/word/embedding", "transformer.wte.weight", PLAIN),
        ("embeddings/position/embedding", "transformer.wpe.weight", PLAIN),
        *(
            (f"{path}/{param}", f"{_STORED}.attn.c_attn.{name}", Layout(part=part, parts=3))
            for part, path in enumerate(_INNER)
            for param, name in (("kernel", "weight"), ("bias", "bias"))
        ),
        # Conv1D stores kernels as (in, out).
        *((f"{_LAYER}/{path}/kernel", f"{_STORED}.{name}.weight", PLAIN) for path, name in _DENSE),
        *((f"{_LAYER}/{path}/bias", f"{_STORED}.{name}.bias", PLAIN) for path, name in _DENSE),
        *((f"{path}/bias", f"{name}.bias", PLAIN) for path, name in _NORM),
        *((f"{path}/scale", f"{name}.weight", PLAIN) for path, name in _NORM),
        ("lm_head/kernel", "lm_head.weight", KERNEL),
        ("classifier/kernel", "score.weight", KERNEL),
    ),
    axes=((r"embeddings/position/embedding", (None, "embed")), *causal.AXES),
    cuts=standard_cuts(_LAYER),
    # The causal mask, and the vocabulary head where the task or tied embeddings make it redundant.
    ignored_names=(r"(.*\.)?attn\.(bias|masked_bias)", r"lm_head\.weight"),
    tied=causal.TIED,
)
