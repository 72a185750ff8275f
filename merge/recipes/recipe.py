"""The recipe of a merge: mergekit's YAML grammar, strictly checked, and a few keys of this package.

`read` has a helper for each mapping of the file. mergekit's keys that this package does not support are refused by name. The
methods and their parameters are those of ``merge.methods.METHODS``.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import storage
from dsee_jax.runtime.storage import Place
from merge.method import Method
from merge.methods import METHODS, find
from merge.recipes import settings, strict_yaml, vocabulary
from merge.recipes.settings import Settings
from merge.recipes.strict_yaml import shown
from merge.recipes.vocabulary import Tokenizer

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The types that a recipe may name, and their names in safetensors."""

_TOP = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_TOP += ("tokenizer", "chat_template", "seed")
_OTHER_METHODS = ("arcee_fusion", "ram", "ramplus_tl")
"""Methods of mergekit 0.1.5 that are refused by name, unless METHODS has them."""


class Input(NamedTuple):
    """One model of a slice."""

    model: str  # the reference as written
    parameters: Settings
    layers: tuple[int, int] | None  # [first, last + 1); None: all
    statistics: Path | None  # safetensors, for the methods that need data
    key: str  # key path in the recipe, such as models[1]


class Slice(NamedTuple):
    """Consecutive layers of the result, and the models that they are merged from."""

    base: Input | None  # changes are measured from it; None for methods without a base
    models: tuple[Input, ...]  # in the recipe's order, without the base
    parameters: Settings
    key: str

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The base, if any, and the models."""
        return (self.base, *self.models) if self.base else self.models


class Recipe(NamedTuple):
    """A checked recipe. The ``models`` form is one slice whose inputs have no layers."""

    path: Place
    text: str
    name: str  # of the method
    method: Method  # for a method over another method: with the options of both
    slices: tuple[Slice, ...]
    parameters: Settings
    base_model: str | None  # as written at the top
    dtype: str | None  # keys of DTYPES
    out_dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None

    @property
    def sliced(self) -> bool:
        """Whether the layers are chosen by ``slices``."""
        return self.slices[0].models[0].layers is not None

    @property
    def origin(self) -> str:
        """The model that gives the result's config, tokenizer and tensor names: the base, or the first model."""
        return self.base_model or self.slices[0].inputs[0].model

    @property
    def references(self) -> tuple[str, ...]:
        """Every model to open, the origin first."""
        models = [self.origin, *(entry.model for part in self.slices for entry in part.inputs)]
        return tuple(dict.fromkeys(models))


def read(path: str | os.PathLike[str]) -> Recipe:
    """Return the checked recipe of a YAML file.

    Args:
      path: the file; at most 1 MB.

    Raises:
      InputError: the file is not YAML; a key, method or parameter is unknown, unsupported, missing or contradictory; or a
        value is invalid. The message is one line that names the file and the key path.
    """
    path = storage.as_path(path)
    text, raw = strict_yaml.read(path)
    if not isinstance(raw, dict):
        content = "is empty" if raw is None else f"holds {shown(raw)} at its top"
        raise InputError(f"{path}: {content}; expected keys such as 'merge_method:' and 'models:'")
    strict_yaml.check_keys(f"{path}: ", raw, _TOP)
    raw = {key: value for key, value in raw.items() if value is not None}
    name, method = _method(path, raw)
    parameters = settings.read(f"{path}: parameters", raw.get("parameters"), {**method.each, **method.shared}, {}, name)
    if "seed" in raw:
        parameters = {**parameters, "seed": _seed(path, raw["seed"], name, method, parameters)}
    base = strict_yaml.text(f"{path}: base_model", raw["base_model"]) if "base_model" in raw else None
    forms = [form for form in ("models", "slices") if form in raw]
    if len(forms) != 1:
        problem = "has both 'models' and 'slices'" if forms else "has neither 'models' nor 'slices'"
        raise InputError(f"{path}: {problem}; expected one of them")
    reader = _Reader(path, name, method, base)
    slices = reader.models(raw["models"]) if forms == ["models"] else reader.slices(raw["slices"])
    for part in slices:
        _check_required(path, name, method, part, parameters)
    if "tokenizer" in raw and "tokenizer_source" in raw:
        raise InputError(
            f"{path}: has both 'tokenizer' and 'tokenizer_source'; keep one (tokenizer.source says the same)"
        )
    tokenizer = None
    if "tokenizer_source" in raw:
        tokenizer = Tokenizer(strict_yaml.text(f"{path}: tokenizer_source", raw["tokenizer_source"]))
    if "tokenizer" in raw:
        tokenizer = vocabulary.read(f"{path}: tokenizer", raw["tokenizer"])
    return Recipe(
        path,
        text,
        name,
        method,
        slices,
        parameters,
        base,
        _dtype(f"{path}: dtype", raw.get("dtype")),
        _dtype(f"{path}: out_dtype", raw.get("out_dtype")),
        tokenizer,
        strict_yaml.text(f"{path}: chat_template", raw["chat_template"], strict_yaml.LARGEST)
        if "chat_template" in raw
        else None,
    )


class _Reader(NamedTuple):
    """The fields that the readers of models and slices share."""

    path: Place
    name: str
    method: Method
    base: str | None

    def models(self, raw: Any) -> tuple[Slice, ...]:
        inputs = self._inputs("models", raw, ("model", "parameters", "statistics"))
        if self.base is not None and all(entry.model != self.base for entry in inputs):
            if self.method.base == "none" and self.method.statistics != "none":
                raise InputError(
                    f"{self.path}: base_model counts as one of {self.name}'s models; list it with its statistics"
                )
            inputs.append(Input(self.base, {}, None, None, "base_model"))
        return (self._slice(inputs, self.base, {}, "models"),)

    def slices(self, raw: Any) -> tuple[Slice, ...]:
        return tuple(self._sources(key, item) for key, item in strict_yaml.items(self.path, "slices", raw))

    def _sources(self, key: str, raw: Mapping[str, Any]) -> Slice:
        strict_yaml.check_keys(f"{self.path}: {key}.", raw, ("sources", "base_model", "parameters"))
        if raw.get("sources") is None:
            raise InputError(f"{self.path}: {key} lacks 'sources'; write a list of models with their layer_range")
        inputs = self._inputs(f"{key}.sources", raw["sources"], ("model", "layer_range", "parameters", "statistics"))
        lengths = {entry.layers[1] - entry.layers[0] for entry in inputs if entry.layers}
        if len(lengths) > 1:
            listed = ", ".join(f"{entry.model} {list(entry.layers or ())}" for entry in inputs)
            raise InputError(
                f"{self.path}: {key}.sources take different numbers of layers: {listed}; expected the same"
            )
        base = self.base
        if raw.get("base_model") is not None:
            base = strict_yaml.text(f"{self.path}: {key}.base_model", raw["base_model"])
            if self.method.base == "none":
                raise InputError(f"{self.path}: {key}.base_model has no effect on {self.name}; list it as a source")
        if base is not None and self.method.base != "none" and all(entry.model != base for entry in inputs):
            raise InputError(
                f"{self.path}: {key}.sources lack the base {shown(base)}; list it with the layer_range to measure from"
            )
        where = f"{self.path}: {key}.parameters"
        options = {**self.method.each, **self.method.shared}
        parameters = settings.read(where, raw.get("parameters"), options, {}, self.name)
        return self._slice(inputs, base, parameters, key)

    def _slice(self, inputs: list[Input], base: str | None, parameters: Settings, key: str) -> Slice:
        if self.method.base == "none":
            base = None
        if self.method.base == "required" and base is None:
            raise InputError(f"{self.path}: base_model is missing; {self.name} measures the models' changes from it")
        models = tuple(entry for entry in inputs if entry.model != base)
        low, high = self.method.models
        if len(models) < low or (high is not None and len(models) > high):
            expected = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            beside_base = " besides the base" if base is not None else ""
            raise InputError(
                f"{self.path}: {key} has {len(models)} model(s){beside_base}; {self.name} takes {expected}"
            )
        return Slice(next((entry for entry in inputs if entry.model == base), None), models, parameters, key)

    def _inputs(self, key: str, raw: Any, keys: Collection[str]) -> list[Input]:
        inputs: dict[str, Input] = {}
        for where, item in strict_yaml.items(self.path, key, raw):
            strict_yaml.check_keys(f"{self.path}: {where}.", item, keys)
            if item.get("model") is None:
                raise InputError(f"{self.path}: {where} lacks 'model'; write model: PATH[@REVISION][+ADAPTER]")
            model = strict_yaml.text(f"{self.path}: {where}.model", item["model"])
            if model in inputs:
                raise InputError(f"{self.path}: {where}.model is {shown(model)}, as {inputs[model].key}; list it once")
            parameters = settings.read(
                f"{self.path}: {where}.parameters",
                item.get("parameters"),
                self.method.each,
                self.method.shared,
                self.name,
            )
            layers = _layer_range(f"{self.path}: {where}", item.get("layer_range")) if "layer_range" in keys else None
            statistics = item.get("statistics")
            if statistics is None and self.method.statistics != "none":
                raise InputError(
                    f"{self.path}: {where} lacks 'statistics'; {self.name} needs FILE.safetensors, collected from its data"
                )
            if statistics is not None:
                if self.method.statistics == "none":
                    raise InputError(f"{self.path}: {where}.statistics has no effect on {self.name}; leave it out")
                written = storage.as_path(strict_yaml.text(f"{self.path}: {where}.statistics", statistics))
                beside = written if storage.remote(written) else self.path.parent / written
                statistics = storage.download(beside if _exists(beside) or not _exists(written) else written)
            inputs[model] = Input(model, parameters, layers, statistics, where)
        return list(inputs.values())


def _method(path: Place, raw: Mapping[str, Any]) -> tuple[str, Method]:
    """Return the method's name and the method; a method over another method has the options of both."""
    if "merge_method" not in raw:
        raise InputError(f"{path}: merge_method is missing; expected one of {', '.join(METHODS)}")
    name = strict_yaml.text(f"{path}: merge_method", raw["merge_method"])
    if name not in METHODS:
        if name in _OTHER_METHODS:
            raise InputError(
                f"{path}: merge_method {name} of mergekit is not supported; there are {', '.join(METHODS)}"
            )
        raise InputError(
            f"{path}: merge_method is {shown(name)}{did_you_mean(name, METHODS)}; expected one of {', '.join(METHODS)}"
        )
    parameters = raw.get("parameters")
    inner = parameters.get("method") if isinstance(parameters, dict) else None
    if inner is None or "method" not in METHODS[name].shared:
        return name, METHODS[name]
    try:
        return name, find(name, {"method": strict_yaml.text(f"{path}: parameters.method", inner)})
    except InputError as error:
        where = f"{path}: parameters.method"
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _seed(path: Place, raw: Any, name: str, method: Method, parameters: Settings) -> settings.Setting:
    if "seed" not in method.shared:
        raise InputError(f"{path}: seed has no effect on {name}, which draws no random numbers; leave it out")
    if "seed" in parameters:
        raise InputError(f"{path}: has both 'seed' and 'parameters.seed'; keep one")
    return (settings.Choice(None, (settings.scalar(f"{path}: seed", raw, method.shared["seed"]),)),)


def _check_required(path: Place, name: str, method: Method, part: Slice, parameters: Settings) -> None:
    """Raise `InputError` for an option without a default that is not set."""
    everywhere = {*parameters, *part.parameters}
    for key, option in method.shared.items():
        if option.default is None and key not in everywhere:
            raise InputError(f"{path}: parameters.{key} is missing; {name} needs it: {option.help}")
    for key, option in method.each.items():
        for entry in part.models:
            if option.default is None and key not in everywhere and key not in entry.parameters:
                where = f"{entry.key}.parameters.{key}" if entry.key != "base_model" else f"parameters.{key}"
                raise InputError(f"{path}: {where} is missing for {shown(entry.model)}; {name} needs it: {option.help}")


def _layer_range(where: str, raw: Any) -> tuple[int, int]:
    if raw is None:
        raise InputError(f"{where} lacks 'layer_range'; write layer_range: [FIRST, LAST + 1]")
    valid = isinstance(raw, list) and len(raw) == 2 and all(type(end) is int for end in raw)
    if not valid or not 0 <= raw[0] < raw[1] < 1_000_000:
        ends = ", ".join(shown(end) for end in raw[:3]) if isinstance(raw, list) else shown(raw)
        raise InputError(
            f"{where}.layer_range is [{ends}]; expected [FIRST, LAST + 1], whole numbers, the second larger"
        )
    return raw[0], raw[1]


def _exists(path: Place) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is invalid for a file
        return False


def _dtype(where: str, raw: Any) -> str | None:
    if raw is None:
        return None
    name = strict_yaml.text(where, raw).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"{where} is {shown(raw)}{did_you_mean(name, DTYPES)}; expected one of {', '.join(DTYPES)}")
    return name
