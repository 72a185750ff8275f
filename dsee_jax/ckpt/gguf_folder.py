"""A GGUF file as a Hugging Face folder in the cache, which every other part of the library reads.

Weights that are quantised become float32; float16 and bfloat16 stay as they are. Nothing of the file is executed: a chat
template stays a text.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsee_jax import models
from dsee_jax.ckpt import gguf, gguf_tokenizer, tensors
from dsee_jax.ckpt.folders import GENERATION, MODEL_CONFIG
from dsee_jax.ckpt.gguf import Gguf
from dsee_jax.errors import InputError, did_you_mean, shorten
from dsee_jax.models.architecture import GgufNames
from dsee_jax.runtime import atomic, storage

log = logging.getLogger(__name__)

_STAMP = "gguf.json"
"""In the unpacked folder: the size and time of the GGUF file, and the version of this module's layout."""
_LAYOUT = 1

_FREQUENCIES = "rope_freqs.weight"
"""The factors by which the rotary frequencies are divided, in files of Llama 3.1 and later."""
_SLOWED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The parameters by which llama.cpp computes these factors."""

_IGNORED = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
"""Keys of an architecture that change nothing: the tensors tell."""


_OPTIONAL = ("attention.key_length",)
"""Keys of an architecture that a file may lack, and that have no default."""


class _Source(NamedTuple):
    """A tensor of a GGUF file."""

    name: str
    head_size: int  # of outputs that alternate between the halves of a head; 0: they do not


def unpack(file: Path) -> Path:
    """Return the folder of a GGUF file; it is written at the first call, and again after the file has changed.

    The folder is in `storage.cache`. Processes that unpack one file wait for each other.

    Raises:
      InputError: the file cannot be read (`gguf.read_header`), is no model, or is one of another architecture; one line.
    """
    file = file.resolve()
    folder = storage.cache() / "gguf" / storage.digest(str(file)) / file.stem
    stat = file.stat()
    stamp = json.dumps({"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "layout": _LAYOUT})
    with storage.locked(str(file)):
        if not (folder / _STAMP).is_file() or (folder / _STAMP).read_text() != stamp:
            header = gguf.read_header(file)
            try:
                config, head_size = _config(header)
                texts, sources = _texts(header, config), _sources(header, head_size)
            except InputError as error:
                raise InputError(f"{file}: {error}") from None
            log.info("%s is unpacked to %s", file, folder)
            with atomic.folder(folder) as partial:
                for name, text in {**texts, _STAMP: stamp}.items():
                    (partial / name).write_text(text, encoding="utf-8")
                _write(partial, header, sources)
    return folder


def _texts(header: Gguf, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the files beside the weights."""
    ids = gguf_tokenizer.special_ids(header.metadata)
    contents = {MODEL_CONFIG: {**config, **ids}, GENERATION: ids}
    texts = {name: json.dumps(fields, indent=2) + "\n" for name, fields in contents.items()}
    return texts | gguf_tokenizer.files(header.metadata)


def _write(folder: Path, header: Gguf, sources: Mapping[str, _Source]) -> None:
    def array(name: str) -> np.ndarray:
        source = sources[name]
        values = gguf.read(header, source.name)
        if not tensors.finite(values):
            raise InputError(f"{header.file}: {source.name!r} holds NaN or infinities: the file is damaged")
        return _halves(values, source.head_size) if source.head_size else values

    kinds = {}
    for name, source in sources.items():
        tensor = header.tensors[source.name]
        kinds[name] = (tensor.kind.name if tensor.kind.name in tensors.FLOATS else "F32", tensor.shape)
    tensors.write_each(folder, kinds, array)


def _halves(array: np.ndarray, head_size: int) -> np.ndarray:
    """Return outputs (heads * head_size, ...) with the halves of each head one after the other instead of alternating."""
    pairs = array.reshape(-1, head_size // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _names(header: Gguf) -> tuple[str, GgufNames]:
    """Return the architecture of a file and its names."""
    supported = {kind: names for each in models.MODELS.values() for kind, names in each.gguf.items()}
    kind = header.metadata.get("general.architecture")
    if not isinstance(kind, str) or kind not in supported:
        raise InputError(
            f"the architecture is {shorten(repr(kind))}{did_you_mean(str(kind), supported)}; supported: {', '.join(supported)}"
        )
    if (content := header.metadata.get("general.type", "model")) != "model":
        raise InputError(f"the file holds {shorten(repr(content))} ('general.type'); expected a model")
    return kind, supported[kind]


def _config(header: Gguf) -> tuple[dict[str, Any], int]:
    """Return the content of ``config.json``, and the size of a head."""
    kind, names = _names(header)
    metadata = {
        key.removeprefix(f"{kind}."): value for key, value in header.metadata.items() if key.startswith(f"{kind}.")
    }
    # The spec of GGUF gives these defaults.
    metadata = {"attention.head_count_kv": metadata.get("attention.head_count"), "rope.freq_base": 10000.0} | metadata
    for key in names.fields:
        if key not in metadata and key not in _OPTIONAL:
            raise InputError(f"the key '{kind}.{key}' is missing in the header: the file is damaged")
    fields = {field: _shortest(metadata.pop(key)) for key, field in names.fields.items() if key in metadata}
    if (words := header.tensors.get("token_embd.weight")) is None or len(words.shape) != 2:
        raise InputError("the tensor 'token_embd.weight' is missing or no matrix: the file is damaged")
    config = {
        **fields,
        "model_type": kind,
        "vocab_size": words.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }
    if scaling := _scaling(metadata):
        config["rope_scaling"] = scaling
    architecture = models.find(kind)
    model = architecture.config.from_hf(config)
    for key in ("rope.dimension_count", "attention.value_length"):
        if metadata.pop(key, model.head_size) != model.head_size:
            raise InputError(f"'{kind}.{key}' is not the size of a head, {model.head_size}; this is not implemented")
    others = [key for key, value in metadata.items() if value and key not in _IGNORED]
    if others:
        raise InputError(f"'{kind}.{others[0]}' is {shorten(repr(metadata[others[0]]))}, which is not implemented")
    if _FREQUENCIES in header.tensors:
        config |= _slowed(header, config["rope_theta"], model.head_size)
    classes = (architecture.model_types[kind], architecture.tasks["causal-lm"])
    return config | {"architectures": ["".join(classes)]}, model.head_size


def _shortest(value: Any) -> Any:
    """Return the shortest decimal of a float32: files hold 1e-5 as 9.999999747e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _scaling(metadata: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``rope_scaling`` and remove its keys."""
    kind = metadata.pop("rope.scaling.type", "none")
    factor, length = (metadata.pop(f"rope.scaling.{key}", None) for key in ("factor", "original_context_length"))
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise InputError(f"'rope.scaling.type' is {shorten(repr(kind))}; supported: none, linear, yarn")
    original = {"original_max_position_embeddings": length} if kind == "yarn" and length else {}
    return {"rope_type": kind, "factor": _shortest(factor), **original}


def _slowed(header: Gguf, theta: float, head_size: int) -> dict[str, Any]:
    """Return ``rope_scaling`` from the factors of `_FREQUENCIES`; raises `InputError` if they are not Llama 3's."""
    stored = gguf.read(header, _FREQUENCIES).astype(np.float64).reshape(-1)
    low, high, original = _SLOWED.values()
    frequencies = theta ** -(np.arange(0, head_size, 2) / head_size)
    share = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    factor = float(stored.max(initial=1.0))
    if stored.shape != share.shape or not np.allclose(1 / ((1 - share) / factor + share), stored, rtol=1e-3):
        raise InputError(
            f"the tensor {_FREQUENCIES!r} holds other factors than those of rope_type llama3, which are not implemented"
        )
    return {} if factor == 1.0 else {"rope_scaling": {"rope_type": "llama3", "factor": factor, **_SLOWED}}


def _sources(header: Gguf, head_size: int) -> dict[str, _Source]:
    """Return ``{Hugging Face's name: source}`` of all tensors."""
    kind, names = _names(header)
    sources, unknown = {}, []
    for name, tensor in header.tensors.items():
        module, _, end = name.rpartition(".")
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
        general = f"blk.{{i}}.{layer[2]}" if layer else module
        if general in names.modules and end in ("weight", "bias"):
            size = head_size if general in names.interleaved else 0
            if size and (not tensor.shape or tensor.shape[0] % size):
                raise InputError(f"the tensor {name!r} has the shape {tensor.shape}; expected heads of {size} rows")
            sources[f"{names.modules[general].format(i=layer[1] if layer else '')}.{end}"] = _Source(name, size)
        elif name != _FREQUENCIES:
            unknown.append(name)
    if unknown:
        shown = ", ".join(map(repr, unknown[:4]))
        raise InputError(f"tensors that {kind} has no place for ({len(unknown)}): {shown}")
    return sources
