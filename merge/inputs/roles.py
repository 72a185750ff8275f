"""The role of a tensor, by its name and shape: embedding, matrix of tokens, head of a task."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from dsee_jax.hf_layout import LAYER
from merge.inputs.lazy import Lazy

_EMBEDDING = re.compile(r"embed(?!_out)|wte|wpe|\bshared\.")
_BODY = re.compile(r"\w*embed(?!_out)\w*|wte|wpe|shared|layer_?norm|norm|ln_f|ln_final|final_layer_?norm|final_norm")
"""First parts of names that belong to the body of a bare model."""
_VOCABULARY = (
    r"(?:.*\.)?(?:\w*embed\w*|wte|shared|\w*lm_head|proj_out|decoder|predictions|vocab_projector|output)"
    r"\.(?:weight|bias)"
)
_NOT_TOKENS = r".*(?:position|token_type|segment|patch).*"
_BEFORE_LAYERS = re.compile(r"embed(?!_out)|wte|wpe|\bshared\.|\b(?:ln|layernorm)_pre\b")
_LANGUAGE = re.compile(r".*(?:ForCausalLM|LMHeadModel|ForConditionalGeneration)")
_TASK = re.compile(r"(?:For[A-Z]\w*|LMHeadModel|DoubleHeadsModel|WithLMHead\w*|Model)$")


def outside_layers(name: str) -> bool:
    """Return whether a tensor is in no numbered layer."""
    return re.search(LAYER, name) is None


def before_layers(name: str) -> bool:
    """Return whether a tensor outside the layers is used before the first layer: an embedding, its norm or projection."""
    return _BEFORE_LAYERS.search(name) is not None


def is_embedding(name: str) -> bool:
    """Return whether a tensor looks up rows: of tokens, positions or types."""
    return _EMBEDDING.search(name) is not None


def vocab_size(config: Mapping[str, Any]) -> int | None:
    """Return the number of rows of the embedding from a model's config, or None if the config does not give it."""
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) and size > 0 else None


def is_vocabulary(name: str, tensor: Lazy, size: int | None) -> bool:
    """Return whether the rows of a tensor are tokens: an embedding or a head by its name, with ``size`` rows."""
    return of_tokens(name) and bool(tensor.shape) and tensor.shape[0] == size


def of_tokens(name: str) -> bool:
    """Return whether the rows of a tensor are tokens, by its name: an embedding of tokens, or an output matrix or bias."""
    return bool(re.fullmatch(_VOCABULARY, name)) and not re.fullmatch(_NOT_TOKENS, name)


def is_matrix_of_tokens(name: str, tensor: Lazy, size: int | None, looked_up: bool) -> bool:
    """Return whether a tensor is an embedding of tokens (``looked_up``), or else an output matrix, with ``size`` rows."""
    whole = len(tensor.shape) == 2 and outside_layers(name) and is_vocabulary(name, tensor, size)
    return whole and is_embedding(name) == looked_up


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the output matrix is the embedding of tokens; a config that does not say ties, as in Hugging Face's."""
    inner = config.get("text_config")
    within = inner.get("tie_word_embeddings", True) if isinstance(inner, dict) else True
    return config.get("tie_word_embeddings", within) is not False


def heads(names: Iterable[str]) -> set[str]:
    """Return the tensors of task heads and poolers: outside the layers, and outside the module that holds the layers.

    Without numbered layers only poolers are known.
    """
    names = list(names)
    modules = {name[: match.start("unit")] for name in names if (match := re.search(LAYER, name))}
    # "bert.encoder.layer." is in the module bert; in a bare model, "encoder.layer." is beside the embeddings.
    bodies = {module.partition(".")[0] for module in modules}
    return {name for name in names if outside_layers(name) and ("pooler." in name or _is_head(name, bodies))}


def _is_head(name: str, bodies: Collection[str]) -> bool:
    first = name.partition(".")[0]
    return bool(bodies) and first not in bodies and not _BODY.fullmatch(first)


def architecture(config: Mapping[str, Any]) -> str:
    """Return the name of the model's class, or an empty text."""
    classes = config.get("architectures")
    return classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""


def writes_text(config: Mapping[str, Any]) -> bool:
    """Return whether the model's class has an output matrix, which may be tied to the embedding."""
    return _LANGUAGE.fullmatch(architecture(config)) is not None


def for_task(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the ``architectures`` of the same model for another task, such as ``ForSequenceClassification``, or nothing."""
    name = architecture(config)
    return {"architectures": [_TASK.sub("", name) + task]} if name else {}


def changed(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a config with a field set, also in its ``text_config`` where that has the field."""
    inner = config.get("text_config")
    if not isinstance(inner, dict) or key not in inner:
        return {**config, key: value}
    return {**config, "text_config": {**inner, key: value}} | ({key: value} if key in config else {})
