"""Folders and files that are no model in Hugging Face's layout with safetensors: one line says what they are and what to do.

Every place that expects a model reads ``config.json`` by `model_config` and the weights by `dsee_jax.ckpt.tensors.index`, so
that each of them has the same lines.
"""

import fnmatch
import glob
import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsee_jax.ckpt.folders import ADAPTER_CONFIG, INDEX, MODEL_CONFIG, PEFT_WEIGHTS, SINGLE, read_json
from dsee_jax.errors import InputError

_PEFT_FILES = (PEFT_WEIGHTS, "adapter_model.bin")

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|training_args)\b.*|rng_state_.*|consolidated.*|openvino_.*"
)
_CONVERT = (
    "import glob, torch, safetensors.torch as s; s.save_file({k: v.clone().contiguous() "
    'for f in sorted(glob.glob(%s)) for k, v in torch.load(f, map_location="cpu", weights_only=True).items()}, '
    '"model.safetensors")'
)

_TRANSFORMERS = (
    "where transformers 4 and %s are installed, open the folder with its class and from_pretrained(FOLDER, %s=True), and "
    "write it with save_pretrained"
)
_ORIGINAL = "give the model from which the file was made"
_HF_LAYOUT = "give the same model in Hugging Face's layout (config.json and model*.safetensors)"
_SHARDED = "gather the parts with the program that wrote them, and save the model with save_pretrained"

_FORMATS = (
    ("flax_model*.msgpack", "weights of Flax", _TRANSFORMERS % ("flax", "from_flax")),
    ("tf_model*.h5", "weights of TensorFlow", _TRANSFORMERS % ("tensorflow", "from_tf")),
    ("*.ckpt*.index", "a checkpoint of TensorFlow", _TRANSFORMERS % ("tensorflow", "from_tf")),
    ("*.ckpt.data-*", "a checkpoint of TensorFlow", _TRANSFORMERS % ("tensorflow", "from_tf")),
    ("*.msgpack", "weights of Flax", _TRANSFORMERS % ("flax", "from_flax")),
    ("*.h5", "weights of Keras", _HF_LAYOUT),
    ("*.keras", "a model of Keras", _HF_LAYOUT),
    ("*.gguf", "a GGUF file among others", "download the file and give its path"),
    ("*.ggml", "a GGML file", _ORIGINAL),
    ("*.onnx", "an ONNX program", _ORIGINAL),
    ("openvino_model*", "an OpenVINO program", _ORIGINAL),
    ("*.tflite", "a TensorFlow Lite program", _ORIGINAL),
    ("*.mlmodel", "a Core ML program", _ORIGINAL),
    ("*.mlpackage", "a Core ML program", _ORIGINAL),
    ("*.ot", "weights of a Rust library", _HF_LAYOUT),
    ("*.nemo", "an archive of NeMo", _HF_LAYOUT),
    ("consolidated*.pth", "the original layout of Meta's models, a pickle", _HF_LAYOUT),
    ("consolidated*.safetensors", "the original layout of Mistral's models", _HF_LAYOUT),
    ("*.distcp", "a sharded checkpoint of PyTorch", _SHARDED),
    ("zero_to_fp32.py", "of a sharded checkpoint of DeepSpeed", "run it there, and convert the file that it writes"),
    ("mp_rank_*", "a sharded checkpoint of Megatron", _SHARDED),
    ("_CHECKPOINT_METADATA", "of a checkpoint of Orbax", "export the model of the run that wrote it"),
    ("*.npz", "arrays of NumPy", _HF_LAYOUT),
    ("*.zip", "an archive", "unpack it and give the folder"),
    ("*.tar*", "an archive", "unpack it and give the folder"),
    ("*.tgz", "an archive", "unpack it and give the folder"),
)
"""(pattern of a file name, the format, the way to a folder that is read), in this order."""


def model_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a model's folder; raises `InputError` that says what the folder is, if it is no model."""
    if folder.is_dir() and not (folder / MODEL_CONFIG).exists():
        raise InputError(describe(folder))
    config = read_json(folder / MODEL_CONFIG)
    # The first layout of sentence-transformers has a config.json of its own beside the folder of the model.
    if "model_type" not in config and (line := _models_inside(folder)):
        raise InputError(line)
    return config


def describe(folder: Path) -> str:
    """Return one line about a folder that lacks ``config.json`` or weights: what the folder is, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    for name in (MODEL_CONFIG, SINGLE, INDEX):
        if (folder / name).is_symlink() and not (folder / name).exists():
            return (
                f"{folder / name} is a link to {os.readlink(folder / name)}, where there is nothing: download the model "
                "again, or copy it with the targets of its links (cp -L)"
            )
    if {ADAPTER_CONFIG, *_PEFT_FILES} & {*names}:
        return _adapter(folder)
    readable = bool({SINGLE, INDEX} & {*names})
    if not readable and (line := describe_names(str(folder), names)):
        return line
    if line := _models_inside(folder):
        return line
    # Names of the user's own files, or of an unfinished download, tell more than those of every model.
    names.sort(key=lambda name: name.endswith((".json", ".txt", ".md")))
    holds = f"holds {', '.join(names[:4])}{' ...' if names[4:] else ''}" if names else "is empty"
    if MODEL_CONFIG in names:
        return f"{folder} holds no weights: expected {SINGLE} or {INDEX}; it {holds}"
    return f"{folder / MODEL_CONFIG} is missing: is {folder} the folder of a model? it {holds}"


def _models_inside(folder: Path) -> str:
    """Return the line about a folder with models in its subfolders; empty: there are none."""
    configs = [path for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/{MODEL_CONFIG}")]
    inner = sorted(path.parent for path in configs if "model_type" in read_json(path))
    return f"{folder} is no model, but holds folders of models: give one of them, such as {inner[-1]}" if inner else ""


def describe_names(place: str, names: Iterable[str]) -> str:
    """Return one line about the weights among the files ``names`` of ``place`` that are not read; empty: there are none."""
    names = list(names)
    if pickle := pickled(names):
        name, convert = pickle
        return (
            f"{place}/{name} is a pickle, which can run code when opened, and is not read; expected {SINGLE}: where torch is "
            f"installed, run in that folder: {convert}"
        )
    for name in names:
        if line := describe_file(f"{place}/{name}"):
            return line
    others = [name for name in names if name.lower().endswith(".safetensors")]
    if any(re.search(r"-\d+-of-\d+\.safetensors$", name) for name in others):
        return f"{place} holds shards ({others[0]} ...) without {INDEX}, which lists them: download or copy it too"
    if others:
        return f"{place} holds {', '.join(others[:4])}; the weights of a model must be named {SINGLE}: rename the file"
    return ""


def describe_file(path: str) -> str:
    """Return one line about a file in a format that is not read; empty: the name tells none."""
    name = path.rpartition("/")[2]
    for pattern, kind, fix in _FORMATS:
        if fnmatch.fnmatchcase(name, pattern):
            return f"{path} is {kind}, which is not read: {fix}"
    return ""


def pickled(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the pickle of weights (or its first shard) among the files of a folder, and the command that converts it."""
    pickles = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in PICKLES)]
    pickles = sorted(name for name in pickles if not _NOT_WEIGHTS.fullmatch(name))
    if not pickles:
        return None
    name = next((name for name in pickles if name.startswith(("pytorch_model", "model"))), pickles[0])
    shards = re.sub(r"-\d+-of-\d+", "-*", glob.escape(name))
    return name, f"python -c {shlex.quote(_CONVERT % json.dumps(shards))}"


def is_peft(folder: Path) -> bool:
    """Return whether a folder holds an adapter of PEFT."""
    return "peft_type" in _adapter_config(folder) or any((folder / name).exists() for name in _PEFT_FILES)


def _adapter_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).exists() else {}


def _adapter(folder: Path) -> str:
    """Return the line about the folder of an adapter."""
    config, peft = _adapter_config(folder), is_peft(folder)
    base = config.get("base_model_name_or_path" if peft else "base")
    kind, base = "a PEFT adapter" if peft else "an adapter of this library", base if isinstance(base, str) else ""
    return (
        f"{folder} is {kind}{f' of {base}' if base else ''} and no model: in a merge recipe, write {base or 'BASE'}+{folder}; "
        f"to train on, set delta.start: {folder}; to load it, use dsee_jax.load_adapter, or generate MODEL --adapter {folder}"
    )
