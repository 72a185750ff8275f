"""The fields of a Hugging Face ``config.json``: each field is used, checked, or known to change nothing.

An unknown field is an error, unless the caller allows it: a model that ignores the field might silently compute other
numbers.
"""

import dataclasses
import itertools
import logging
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.hf_layout import QUANTISED
from dsee_jax.models.architecture import ModelConfig

RUN = ("num_labels", "dtype")
"""Fields of our configs that the run sets. Hugging Face's ``dtype`` is the storage type, which the tensors themselves tell."""

PER_LAYER = "per_layer_config"
"""The field of transformers 5 for models whose layers differ: ``{number of the layer: {name: value}}``."""

FIXED: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "auto_map": ({}, None),
    **dict.fromkeys(QUANTISED, (None,)),
    # other rotary positions
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1.0, None),
}
"""Fields that would change the result of any model, with the values that do not."""

HARMLESS: tuple[tuple[str, str], ...] = (
    (
        r"_.*|model_type|architectures|model_name|name|name_or_path|transformers_version|commit_hash",
        "origin of the file",
    ),
    (r"language|license|tags|author|description|version|library_name|pipeline_tag|base_model|datasets", "model card"),
    (r"is_llama_config", "a mark of the converter of SmolLM2: the model_type says the same"),
    (r"unsloth_.*", "marks of Unsloth"),
    (r"neftune_noise_alpha", "noise in training by TRL and Unsloth, which a saved model does not apply"),
    (
        r"transformers\.js_config|onnx_.*|export_model_type|neuron",
        "settings of programs for browsers and for other chips",
    ),
    (r"sentence_transformers|sbert_.*", "settings of sentence-transformers, such as the activation after the logits"),
    (r"task_specific_params|finetuning_task|prefix|task_names", "uses of the model"),
    (r"adapter.*|prediction_heads|custom_heads", "adapters and heads of AdapterHub, which are stored apart"),
    (
        r"tokenizer_.*|(bos|eos|pad|unk|sep|cls|mask)_token|model_max_length|truncation.*|padding(_side)?",
        "settings of the tokenizer",
    ),
    (r"(bos|eos|eod|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_ids?", "ids that generation reads"),
    (
        r"max_sequence_length|max_seq_(length|len)|max_model_len|seq_length|n_ctx",
        "lengths; the tables of positions tell",
    ),
    (r"num_labels|id2label|label2id|problem_type|label_smoothing(_factor)?|loss_type", "labels and losses"),
    (r"torch_dtype|dtype|torchscript|use_bfloat16|fp16|bf16|use_fp16", "types; the tensors tell"),
    (
        r"tf_legacy_loss|return_dict|use_return_dict|output_.*|use_cache|chunk_size_feed_forward|model_parallel",
        "running",
    ),
    (r"gradient_checkpointing.*|use_reentrant", "memory in training"),
    (r"pretraining_tp", "the parts that a product was computed in, whose sum is the same"),
    (r"attn_impl(ementation)?|use_(flash|memory_efficient)_att(ention|n)(_2)?|use_sdpa", "kernels of attention"),
    (r"dual_chunk_attention_config", "attention of vLLM to texts beyond the pretraining, which transformers lacks"),
    (r"tie_word_embeddings|tie_encoder_decoder|tie_last_hidden_states|padding_idx", "sharing; the tensors tell"),
    (r"directionality|pooler_.*", "left from TensorFlow"),
    (r"summary_.*", "heads of GPT-2 that this library lacks"),
    (r"n_special|predict_special_tokens", "vocabulary of the first GPT"),
    (r"cross_attention_hidden_size", "cross attention, which is refused"),
    (
        r"(max|min)_(new_tokens|length)|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature"
        r"|top_[kph]|min_p|typical_p|(epsilon|eta)_cutoff|(encoder_)?repetition_penalty|length_penalty|penalty_alpha"
        r"|(encoder_)?no_repeat_ngram_size|bad_words_ids|force_words_ids|num_return_sequences|(begin_)?suppress_tokens"
        r"|remove_invalid_values|renormalize_logits|exponential_decay_length_penalty|forced_decoder_ids|guidance_scale"
        r"|stop_strings|max_time|num_assistant_tokens.*|prompt_lookup_num_tokens|cache_implementation",
        "text generation",
    ),
)
"""(regex of a name, reason): fields that change no logit of a model that is read from a folder."""

_QUANTISED = (
    "so the weights are quantised, which is not read: give the model that was quantised, or, where transformers and the "
    "quantiser are installed, write it with from_pretrained(FOLDER).dequantize().save_pretrained(OUT)"
)

_HARMLESS = re.compile("|".join(f"(?:{pattern})" for pattern, _ in HARMLESS))

log = logging.getLogger(__name__)

_ANY = 2**31 - 1
_MOST = {
    **{"num_hidden_layers": 1024, "n_layer": 1024, "num_labels": 10**7},
    **{"hidden_size": 2**18, "n_embd": 2**18, "head_dim": 2**18},
}
"""The largest sizes: more than any model has, and few enough for the shapes of all params to be computed in seconds."""

_EXPECTED = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}

C = TypeVar("C", bound=ModelConfig)


def read(
    config_class: type[C],
    fields: Mapping[str, Any],
    *,
    fixed: Mapping[str, tuple[Any, ...]],
    allow_unknown: bool = False,
    **run: Any,
) -> C:
    """Return ``config_class`` (a dataclass with Hugging Face's names) filled from a ``config.json``.

    Args:
      config_class: every field without a default must be in ``fields``.
      fields: the parsed file.
      fixed: for fields that are not implemented, the values that change nothing; added to `FIXED`.
      allow_unknown: ignore unknown fields with a warning.
      **run: `RUN` fields.

    Raises:
      InputError: a field is missing, unknown, or has a value that is not implemented.
    """
    fixed = FIXED | dict(fixed)
    names = {field.name: field for field in dataclasses.fields(config_class) if field.name not in RUN}  # pyright: ignore
    for name, field in names.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise InputError(
                f"{name!r} is missing; it has no default{did_you_mean(name, fields.keys() - names.keys())}"
            )
    for name, value in fields.items():
        if name in fixed and value not in fixed[name]:
            reason = _QUANTISED if name in QUANTISED else f"which is not implemented; only {fixed[name][0]!r} is"
            raise InputError(f"{name!r} is {shorten(repr(value))}, {reason}")
        # A field that is null is not set.
        known = name in names or name in fixed or name == PER_LAYER
        if not known and value is not None and not _HARMLESS.fullmatch(name):
            if allow_unknown:
                log.warning(
                    "config.json: unknown field %r = %.60r is ignored: the numbers of the model may differ", name, value
                )
                continue
            near = did_you_mean(name, names.keys() - fields.keys())
            raise InputError(
                f"unknown field {name!r}{near}; it may change the numbers of the model: if it does not, pass "
                "allow_unknown=True (model.allow_unknown: true in a config)"
            )
    values = {name: fields[name] for name in names if name in fields}
    # A config is a static argument of compiled functions, so it must be hashable.
    config = config_class(**{name: _tuples(x) for name, x in values.items()}, **run)
    for name, field in names.items():
        kinds = get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        if not any(_fits(value := getattr(config, name), kind) for kind in kinds):
            expected = " or ".join(_EXPECTED.get(kind, "a list") for kind in kinds)
            raise InputError(f"{name!r} is {value!r:.80}; expected {expected}")
    config = config.with_widths(**config.widths)
    if (layers := fields.get(PER_LAYER)) not in (None, {}, per_layer(config)):
        raise InputError(
            f"{PER_LAYER!r} is {shorten(repr(layers))}, which is not implemented; it may only repeat 'kept_heads' and "
            "'kept_neurons'"
        )
    return config


def _tuples(value: Any) -> Any:
    """Return a value of JSON with tuples for its lists, at every depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value of a config has the type of its field: a whole number is a float, true is no number."""
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is kind and (kind is not int or abs(value) < 2**31)


def names(config: Any) -> frozenset[str]:
    """Return the names of the fields that `read` takes."""
    return frozenset(field.name for field in dataclasses.fields(config)) - {*RUN}


def write(config: Any) -> dict[str, Any]:
    """Return the fields that `read` takes, for a ``config.json``, without those that are None; nested groups likewise.

    The config's ``explicit`` names the fields whose None is written: without it, they would be read as another value. Its
    ``earlier`` fields repeat some of them in the layout of earlier versions of Hugging Face.
    """
    values = {name: getattr(config, name) for name in sorted(names(config))}
    values = {name: write(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    explicit = getattr(config, "explicit", ())
    values = {name: value for name, value in values.items() if value is not None or name in explicit}
    return values | getattr(config, "earlier", {})


def check(config: Any, *, sizes: tuple[str, ...], rates: tuple[str, ...], flags: tuple[str, ...] = ()) -> None:
    """Raise `InputError` unless sizes are whole numbers from 1 to a bound, rates numbers in [0, 1) and flags true or false.

    A flag may also be None.
    """
    for name in sizes:
        value = getattr(config, name)
        most = _MOST.get(name, _ANY)
        if type(value) is not int or not 1 <= value <= most:
            raise InputError(f"{name!r} is {value!r:.80}; expected a whole number from 1 to {most}")
    for name in rates:
        value = getattr(config, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(f"{name!r} is {value!r:.80}; expected a number in [0, 1)")
    for name in flags:
        value = getattr(config, name)
        if value is not None and type(value) is not bool:
            raise InputError(f"{name!r} is {value!r}; expected true or false")


def check_widths(config: Any, name: str, layers: int, most: int) -> None:
    """Raise `InputError` unless the field ``name`` is None or ``layers`` whole numbers in 0 .. ``most``."""
    value = getattr(config, name)
    if value is None:
        return
    if not isinstance(value, tuple) or len(value) != layers:
        raise InputError(f"{name!r} is {value!r}; expected one number for each of the {layers} layers")
    for width in value:
        if type(width) is not int or not 0 <= width <= most:
            raise InputError(f"{name!r} holds {width!r}; expected whole numbers from 0 to {most}")


def kept_widths(widths: Sequence[int] | None, full: int) -> tuple[int, ...] | None:
    """Return the ``kept_*`` field for ``widths``, units per layer: None if every layer has all ``full`` units."""
    return None if widths is None or set(widths) == {full} else tuple(widths)


def shared_width(widths: Sequence[int] | None) -> int | None:
    """Return the number of units that every layer has; None if layers differ or have none: no standard field says that."""
    return widths[0] if widths and len(set(widths)) == 1 and widths[0] else None


def standard_width(widths: Sequence[int] | None, standard: int) -> int:
    """Return the number of units for a standard field whose value is ``standard``: the shared one, or room for every layer."""
    return shared_width(widths) or max(standard, *(widths or (0,)))


def of_layers(values: Sequence[Any] | None, kept: Sequence[bool]) -> tuple[Any, ...] | None:
    """Return the values of the layers of ``kept`` (layers,), True = kept, from a field with one value per layer, or None."""
    return None if values is None else tuple(itertools.compress(values, kept))


def divided_heads(heads: Sequence[int] | None, number: int, size: int, width: int) -> tuple[int, int | None]:
    """Return the number of heads and the field ``kept_head_size`` of a family that computes the size as width / number.

    Args:
      heads: the heads of every layer; None: ``number`` in each.
      number: the field for the number of heads so far.
      size: entries of a head.
      width: entries of the hidden state.

    Returns:
      The number that every layer has, if heads of ``size`` fill the width with it; else the largest number, at least
      ``number``. The size is None where the two fields tell it.
    """
    if heads is not None:
        shared = shared_width(heads)
        number = shared if shared and shared * size == width else max(number, *heads)
    return number, None if number * size == width else size


def kept_kinds(config: Any) -> tuple[str, ...]:
    """Return the kinds of units whose numbers no standard field can hold: other programs do not open such a model.

    ``hidden`` is among them where the size of the heads does not follow from the hidden width.
    """
    kinds = tuple(kind for kind in config.widths if getattr(config, f"kept_{kind}") is not None)
    return (*kinds, "hidden") if config.own_width else kinds


def per_layer(config: Any) -> dict[str, dict[str, Any]]:
    """Return the value of `PER_LAYER`: by layer, the standard fields that differ from those of the model.

    It is empty if all layers agree, or if the standard fields cannot describe the units of a layer. The config's ``undivided``
    names fields that no layer may have of its own.
    """
    if not kept_kinds(config):
        return {}
    common, layers, depth = write(config.with_widths()), {}, len(next(iter(config.widths.values())))
    for number in range(depth):
        alone = config.with_widths(**{kind: (widths[number],) * depth for kind, widths in config.widths.items()})
        if kept_kinds(alone):
            return {}
        layers[str(number)] = {name: value for name, value in write(alone).items() if value != common.get(name)}
    layers = {number: fields for number, fields in layers.items() if fields}
    return (
        {} if any(name in fields for name in getattr(config, "undivided", ()) for fields in layers.values()) else layers
    )
