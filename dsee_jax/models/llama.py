"""Llama (arXiv 2302.13971, 2407.21783) in plain Linen, numerically equal to Hugging Face's; also Mistral, Qwen2, Qwen3."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.hf_layout import KERNEL, PLAIN
from dsee_jax.models import causal, hf_config, rope
from dsee_jax.models.architecture import Architecture, GgufNames, UnitTemplate
from dsee_jax.models.cache import Context
from dsee_jax.models.causal import CausalAttention, CausalLayer, CausalModel
from dsee_jax.models.layers import ACTIVATIONS, Bias, JointDense, RmsNorm, init

_QWEN = {"max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "attention_bias": True, **_QWEN},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, **_QWEN},
}
"""The defaults that differ from those of `Config`."""

_NO_WINDOW = dict.fromkeys(("use_sliding_window", "max_window_layers", "layer_types"), (None,))
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"sliding_window": (None,), **_NO_WINDOW},
    "mistral": {"attention_bias": (False, None), "mlp_bias": (False, None), **_NO_WINDOW},
    "qwen2": {"attention_bias": (True, None), "mlp_bias": (False, None), "use_mrope": (False, None)},
    "qwen3": {"mlp_bias": (False, None)},
}
"""For fields that a ``model_type`` lacks, the values that change nothing."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields of ``config.json`` under Hugging Face's names.

    ``kept_heads`` and ``kept_neurons`` are our own; the run sets ``num_labels`` and ``dtype``.

    Raises:
      InputError: a size below 1, a rate outside [0, 1), heads that do not divide the width or one another, kept widths that
        are not one number per layer or exceed the unpruned width, an activation, layer type or dtype that is not implemented.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    model_type: str = "llama"
    """A key of `ARCHITECTURE.model_types`."""
    num_key_value_heads: int | None = None
    """None: num_attention_heads."""
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    """Biases of query, key and value, and (except for qwen2) of the attention output."""
    mlp_bias: bool | None = None
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    rope_parameters: rope.Rope = rope.DEFAULT
    sliding_window: int | None = None
    """The number of tokens that a token sees, itself included; mistral: in every layer."""
    use_sliding_window: bool | None = None
    """qwen: whether sliding_window applies."""
    max_window_layers: int | None = None
    """qwen: the first layer with a window; layer_types takes precedence."""
    layer_types: tuple[str, ...] | None = None
    """qwen: full_attention or sliding_attention for every layer."""
    kept_heads: tuple[int, ...] | None = None
    """Key/value heads, with the query heads that read them, of each layer of a structurally pruned model. None: all."""
    kept_neurons: tuple[int, ...] | None = None
    """Feed-forward neurons of each layer of a structurally pruned model. None: intermediate_size in each."""
    num_labels: int = 2
    """Columns of the classifier; 1 for regression."""
    dtype: str = "float32"
    """float32 or bfloat16: of the matrix products."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        some = ("num_key_value_heads", "head_dim", "sliding_window")
        hf_config.check(
            self,
            sizes=(
                *(*sizes, "max_position_embeddings", "num_labels"),
                *(name for name in some if getattr(self, name) is not None),
            ),
            rates=("attention_dropout", "rms_norm_eps", "initializer_range"),
            flags=("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"),
        )
        first = self.max_window_layers
        if first is not None and (type(first) is not int or first < 0):
            raise InputError(f"'max_window_layers' is {first!r}; expected a whole number from 0")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"'hidden_size' is {self.hidden_size}, not a multiple of 'num_attention_heads' = {self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise InputError(f"a head has {self.head_size} entries; rotary positions need an even number ('head_dim')")
        if self.rope_parameters.rope_type == "dynamic" and self.head_size <= 2:
            raise InputError("a head has 2 entries; 'rope_type' 'dynamic' needs 4 or more ('head_dim')")
        if self.num_attention_heads % self.groups:
            raise InputError(
                f"'num_attention_heads' is {self.num_attention_heads}, not a multiple of 'num_key_value_heads' = "
                f"{self.groups}"
            )
        hf_config.check_widths(self, "kept_heads", self.num_hidden_layers, self.groups)
        hf_config.check_widths(self, "kept_neurons", self.num_hidden_layers, self.intermediate_size)
        for name, options in (("hidden_act", tuple(ACTIVATIONS)), ("dtype", ("float32", "bfloat16"))):
            if (value := getattr(self, name)) not in options:
                near = did_you_mean(str(value), options)
                raise InputError(f"{name!r} is {value!r}{near}; implemented: {', '.join(options)}")
        types = self.layer_types
        if types is not None and (
            not isinstance(types, tuple)
            or len(types) != self.num_hidden_layers
            or any(kind not in ("full_attention", "sliding_attention") for kind in types)
            or ("sliding_attention" in types and not (self.use_sliding_window and self.sliding_window))
        ):
            raise InputError(
                f"'layer_types' is {types!r}; expected full_attention or, with use_sliding_window and sliding_window, "
                f"sliding_attention for each of the {self.num_hidden_layers} layers"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **run: Any) -> Self:
        """Read a parsed ``config.json``; ``run`` gives num_labels and dtype. Raises `InputError` as `hf_config.read` does."""
        kind = config.get("model_type", cls.model_type)
        parameters, rest = rope.read(config)
        return hf_config.read(
            cls, {**_DEFAULTS[kind], **rest, "rope_parameters": parameters}, fixed=_FIXED[kind], **run
        )

    def with_dropout(self, rate: float) -> Self:
        """Return this config with every dropout rate set to ``rate``, in [0, 1)."""
        return dataclasses.replace(self, attention_dropout=rate)

    type_vocab_size = 0
    """The model has no token types."""

    @property
    def longest(self) -> int | None:
        """Tokens of the longest intended input, with scaled positions; None: no limit."""
        return rope.longest(self.rope_parameters, self.max_position_embeddings)

    @property
    def explicit(self) -> frozenset[str]:
        """Fields whose None must be written: a missing field has another value in this ``model_type``."""
        return frozenset(name for name in _DEFAULTS[self.model_type] if getattr(self, name) is None)

    @property
    def earlier(self) -> dict[str, Any]:
        """Fields in the layout of transformers 4, which many other programs read as well."""
        return rope.earlier(self.rope_parameters)

    @property
    def undivided(self) -> tuple[str, ...]:
        """Fields that no layer may have of its own: LlamaConfig reads that of the model, and refuses the file."""
        return ("num_attention_heads",) if self.model_type == "llama" else ()

    @property
    def groups(self) -> int:
        """Key/value heads of a layer, unless ``kept_heads`` tells otherwise."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Entries of a head; pruning other heads does not change it."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def own_width(self) -> bool:
        """Whether the standard fields cannot hold the size of the heads beside the hidden width."""
        # LlamaConfig alone refuses a hidden_size that is no multiple of the heads, also where head_dim is given.
        return self.model_type == "llama" and self.hidden_size % self.num_attention_heads > 0

    @property
    def group_size(self) -> int:
        """Entries of all query heads that share one key/value head."""
        return self.head_size * (self.num_attention_heads // self.groups)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The number of tokens that a token sees, per layer; None: all earlier tokens."""
        # In a model type that has the field, null means false.
        applies = "use_sliding_window" not in _DEFAULTS[self.model_type] or self.use_sliding_window
        if self.sliding_window is None or not applies:
            return (None,) * self.num_hidden_layers
        first = self.max_window_layers or 0
        types = self.layer_types or tuple(
            "sliding_attention" if number >= first else "full_attention" for number in range(self.num_hidden_layers)
        )
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in types)

    @property
    def uneven(self) -> str:
        """The fields by which layers differ; empty: all layers are alike."""
        widths = [f"kept_{kind}" for kind, numbers in self.widths.items() if len(set(numbers)) > 1]
        return ", ".join([*widths, *(["layer_types"] if len(set(self.windows)) > 1 else [])])

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The number of units of each kind (``heads``, ``neurons``) in every layer."""
        return {
            "heads": self.kept_heads or (self.groups,) * self.num_hidden_layers,
            "neurons": self.kept_neurons or (self.intermediate_size,) * self.num_hidden_layers,
        }

    def with_widths(self, heads: Sequence[int] | None = None, neurons: Sequence[int] | None = None) -> Self:
        """Return this config with these numbers of units in every layer; None: the numbers of the standard fields.

        Equal numbers in all layers become ``intermediate_size`` and, with ``head_dim``, the numbers of heads. Where the
        numbers of heads cannot be standard fields, these fields hold the largest number of a layer, at least that so far.
        """
        width, groups = hf_config.standard_width(neurons, self.intermediate_size), hf_config.shared_width(heads)
        ratio = self.num_attention_heads // self.groups
        count = (groups or self.groups) * ratio
        # LlamaConfig alone refuses a hidden_size that is no multiple of the heads, also where head_dim is given.
        standard = self.model_type != "llama" or self.hidden_size % count == 0
        number = groups if groups and standard else max(self.groups, *(heads or (0,)))
        changes: dict[str, Any] = {}
        if number != self.groups:
            changes = {"num_attention_heads": number * ratio, "num_key_value_heads": number, "head_dim": self.head_size}
        return dataclasses.replace(
            self,
            **changes,
            intermediate_size=width,
            kept_heads=hf_config.kept_widths(heads, number),
            kept_neurons=hf_config.kept_widths(neurons, width),
        )

    def with_hidden(self, size: int) -> Self:
        """Return this config with ``size`` entries of the hidden state, and heads of the size that they have."""
        return dataclasses.replace(self, hidden_size=size, head_dim=self.head_size)

    def with_layers(self, kept: Sequence[bool]) -> Self:
        """Return this config with the layers of ``kept`` (layers,), True = kept, renumbered; each keeps its window."""
        first = self.max_window_layers
        return dataclasses.replace(
            self,
            num_hidden_layers=int(sum(kept)),
            max_window_layers=None if first is None else int(sum(kept[:first])),
            layer_types=hf_config.of_layers(self.layer_types, kept),
            kept_heads=hf_config.of_layers(self.kept_heads, kept),
            kept_neurons=hf_config.of_layers(self.kept_neurons, kept),
        )


class Embeddings(nn.Module):
    """The table of words."""

    config: Config

    def setup(self) -> None:
        """Declare the table."""
        self.word = nn.Embed(self.config.vocab_size, self.config.hidden_size, embedding_init=init(self.config))

    def __call__(self, input_ids: jax.Array, positions: jax.Array, deterministic: bool) -> jax.Array:
        """Return (batch, length, width) for ids (batch, length); the layers apply the positions."""
        return self.word(input_ids).astype(self.config.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Return (..., vocab_size), the products of ``x`` (..., width) with every row."""
        return x @ self.word.embedding.T.astype(x.dtype)


class GatedMlp(nn.Module):
    """``down(activation(gate(x)) * up(x))`` (arXiv 2002.05202); without neurons, only the last bias, or zeros."""

    config: Config
    neurons: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return (..., width) for ``x`` (..., width)."""
        config, dtype, bias = self.config, jnp.dtype(self.config.dtype), bool(self.config.mlp_bias)
        if not self.neurons:
            return Bias(config.hidden_size, dtype, name="down")(x) if bias else jnp.zeros_like(x)
        names = ("gate", "up")
        inner = JointDense(names, (self.neurons,) * 2, dtype, init(config), () if bias else names, name="inner")
        nn.share_scope(self, inner)
        gate, up = inner(x)
        down = nn.Dense(config.hidden_size, use_bias=bias, dtype=dtype, kernel_init=init(config), name="down")
        return down(ACTIVATIONS[config.hidden_act](gate) * up)


class Layer(CausalLayer):
    """Attention, then the feed-forward part; each reads the normalised sum of all earlier outputs."""

    config: Config

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        context: Context,
        rotation: tuple[jax.Array, jax.Array],
        cache: Mapping[str, jax.Array] | None,
        deterministic: bool,
    ) -> tuple[jax.Array, Mapping[str, jax.Array] | None]:
        """Return (batch, length, width) for ``x`` of that shape, and the layer's cache with these tokens written."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        attention = CausalAttention(
            groups=config.widths["heads"][self.number],
            per_group=config.num_attention_heads // config.groups,
            head_size=config.head_size,
            width=config.hidden_size,
            scale=config.head_size**-0.5,
            window=config.windows[self.number],
            use_bias=config.attention_bias,
            use_output_bias=config.attention_bias and config.model_type != "qwen2",
            norm_epsilon=config.rms_norm_eps if config.model_type == "qwen3" else None,
            dropout_rate=config.attention_dropout,
            dtype=dtype,
            kernel_init=init(config),
            name="attention",
        )
        y = RmsNorm(config.rms_norm_eps, dtype, name="attention_norm")(x)
        y, cache = attention(y, context, rotation, cache, deterministic)
        x = x + y
        y = RmsNorm(config.rms_norm_eps, dtype, name="mlp_norm")(x)
        return x + GatedMlp(config, config.widths["neurons"][self.number], name="mlp")(y), cache


class Llama(CausalModel):
    """Llama with the head of a task (`ARCHITECTURE.tasks` lists them)."""

    def parts(self) -> tuple[nn.Module, Callable[..., nn.Module], int, nn.Module]:
        """Return the embeddings, the factory of layers, the number of layers and the last norm."""
        config = self.config
        norm = RmsNorm(config.rms_norm_eps, jnp.dtype(config.dtype), name="norm")
        return Embeddings(config, name="embeddings"), functools.partial(Layer, config), config.num_hidden_layers, norm

    def rotation(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return cosines and sines."""
        config = self.config
        return rope.rotation(config.rope_parameters, positions, config.head_size, config.max_position_embeddings)


_LAYER, _STORED = "decoder/layer_{i}", "model.layers.{i}"
_ATTENTION, _MLP = f"{_LAYER}/attention", f"{_LAYER}/mlp"
_DENSE = (
    *(("attention/query", "self_attn.q_proj"), ("attention/key", "self_attn.k_proj")),
    *(("attention/value", "self_attn.v_proj"), ("attention/output", "self_attn.o_proj")),
    *(("mlp/gate", "mlp.gate_proj"), ("mlp/up", "mlp.up_proj"), ("mlp/down", "mlp.down_proj")),
)
_NORM = (
    *(("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")),
    *(("attention/query_norm", "self_attn.q_norm"), ("attention/key_norm", "self_attn.k_norm")),
)

_GGUF_FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
_GGUF_MODULES = {
    **{"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
    **{
        f"blk.{{i}}.{short}": f"{_STORED}.{name}"
        for short, name in (
            *(("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj")),
            *(("attn_output", "self_attn.o_proj"), ("attn_norm", "input_layernorm")),
            *(("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")),
            ("ffn_norm", "post_attention_layernorm"),
        )
    },
}

ARCHITECTURE = Architecture(
    config=Config,
    model=Llama,
    model_types={"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    tasks=causal.TASKS,
    head=causal.HEAD,
    prefix="model.",
    hf_names=(
        ("embeddings/word/embedding", "model.embed_tokens.weight", PLAIN),
        *((f"{_LAYER}/{path}/kernel", f"{_STORED}.{name}.weight", KERNEL) for path, name in _DENSE),
        *((f"{_LAYER}/{path}/bias", f"{_STORED}.{name}.bias", PLAIN) for path, name in _DENSE),
        *((f"{_LAYER}/{path}/scale", f"{_STORED}.{name}.weight", PLAIN) for path, name in _NORM),
        ("norm/scale", "model.norm.weight", PLAIN),
        ("lm_head/kernel", "lm_head.weight", KERNEL),
        ("classifier/kernel", "score.weight", KERNEL),
    ),
    axes=((r".*/attention/(query_norm|key_norm)/scale", (None,)), *causal.AXES),
    cuts={
        # A key/value head with all query heads that read it: none of them works without it.
        "heads": UnitTemplate(
            axes=(
                *((f"{_ATTENTION}/{name}/kernel", 1, "head_size") for name in ("key", "value")),
                *((f"{_ATTENTION}/{name}/bias", 0, "head_size") for name in ("key", "value")),
                (f"{_ATTENTION}/query/kernel", 1, "group_size"),
                (f"{_ATTENTION}/query/bias", 0, "group_size"),
                (f"{_ATTENTION}/output/kernel", 0, "group_size"),
            ),
            scored=(f"{_ATTENTION}/query/kernel", f"{_ATTENTION}/value/kernel"),
        ),
        "neurons": UnitTemplate(
            axes=(
                *((f"{_MLP}/{name}/kernel", 1, 1) for name in ("gate", "up")),
                *((f"{_MLP}/{name}/bias", 0, 1) for name in ("gate", "up")),
                (f"{_MLP}/down/kernel", 0, 1),
            ),
            scored=(f"{_MLP}/gate/kernel", f"{_MLP}/up/kernel"),
        ),
    },
    # Constants, and the vocabulary head where the task or tied embeddings make it redundant.
    ignored_names=(r"(.*\.)?rotary_emb\.inv_freq", r"lm_head\.weight"),
    tied=causal.TIED,
    gguf={
        # llama.cpp rotates adjacent entries of a head for llama, and the two halves of a head for the others.
        "llama": GgufNames(_GGUF_FIELDS, _GGUF_MODULES, interleaved=("blk.{i}.attn_q", "blk.{i}.attn_k")),
        "qwen2": GgufNames(_GGUF_FIELDS, _GGUF_MODULES),
    },
)
