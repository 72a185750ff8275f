"""The recipe of a merge: mergekit's YAML grammar, strictly checked, and a few keys of our own.

Every sentence of the grammar is in `read`'s helpers, one for each mapping of the file. What mergekit has and this package has
not is refused by name. Which methods and parameters there are is the table's business, ``merge.methods.METHODS``.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax import stores
from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.stores import Place
from merge.method import Method
from merge.methods import METHODS, find
from merge.recipes import document, settings, vocabulary
from merge.recipes.document import shown
from merge.recipes.settings import Settings
from merge.recipes.vocabulary import Tokenizer

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What a recipe may name as type, and its name in safetensors."""

_TOP = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
_TOP += ("tokenizer", "chat_template", "seed")
_OTHER_METHODS = ("arcee_fusion", "ram", "ramplus_tl")
"""Methods of mergekit 0.1.5 that are refused by name, unless the table has them."""


class Input(NamedTuple):
    """One model of a slice."""

    model: str  # the reference as written
    parameters: Settings
    layers: tuple[int, int] | None  # [first, last + 1); None: all
    statistics: Path | None  # safetensors, for the methods that need data
    key: str  # key path in the recipe, such as models[1]


class Slice(NamedTuple):
    """Some layers of the result, and what they are merged from."""

    base: Input | None  # what changes are measured from; None for methods without a base
    models: tuple[Input, ...]  # in the recipe's order, the base apart
    parameters: Settings
    key: str

    @property
    def inputs(self) -> tuple[Input, ...]:
        """The base, where there is one, and the models."""
        return (self.base, *self.models) if self.base else self.models


class Recipe(NamedTuple):
    """A checked recipe. The ``models`` form is one slice whose inputs have no layers."""

    path: Place
    text: str
    name: str  # of the method
    method: Method  # for a method on top of another: with the other's options
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
        """The model whose config, tokenizer and names of tensors the result has: the base, or the first model."""
        return self.base_model or self.slices[0].inputs[0].model

    @property
    def references(self) -> tuple[str, ...]:
        """Every model to open, the origin first."""
        found = [self.origin, *(entry.model for part in self.slices for entry in part.inputs)]
        return tuple(dict.fromkeys(found))


def read(path: str | os.PathLike[str]) -> Recipe:
    """Return the checked recipe of a YAML file.

    Args:
      path: the file; at most 1 MB.

    Raises:
      InputError: not YAML, an unknown or unsupported key, method or parameter, a missing or contradictory one, or a value
        that does not fit; one line that names the file and the key path.
    """
    path = stores.place(path)
    text, raw = document.read(path)
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds {shown(raw)} at its top"
        raise InputError(f"{path}: {found}; expected keys such as 'merge_method:' and 'models:'")
    document.known(f"{path}: ", raw, _TOP)
    raw = {key: value for key, value in raw.items() if value is not None}
    name, method = _method(path, raw)
    parameters = settings.read(f"{path}: parameters", raw.get("parameters"), {**method.each, **method.shared}, {}, name)
    if "seed" in raw:
        parameters = {**parameters, "seed": _seed(path, raw["seed"], name, method, parameters)}
    base = document.text(f"{path}: base_model", raw["base_model"]) if "base_model" in raw else None
    forms = [form for form in ("models", "slices") if form in raw]
    if len(forms) != 1:
        what = "has both 'models' and 'slices'" if forms else "has neither 'models' nor 'slices'"
        raise InputError(f"{path}: {what}; expected one of them")
    reader = _Reader(path, name, method, base)
    slices = reader.models(raw["models"]) if forms == ["models"] else reader.slices(raw["slices"])
    for part in slices:
        _complete(path, name, method, part, parameters)
    if "tokenizer" in raw and "tokenizer_source" in raw:
        raise InputError(
            f"{path}: has both 'tokenizer' and 'tokenizer_source'; keep one (tokenizer.source says the same)"
        )
    tokenizer = None
    if "tokenizer_source" in raw:
        tokenizer = Tokenizer(document.text(f"{path}: tokenizer_source", raw["tokenizer_source"]))
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
        document.text(f"{path}: chat_template", raw["chat_template"], document.LARGEST)
        if "chat_template" in raw
        else None,
    )


class _Reader(NamedTuple):
    """What the readers of models and slices share."""

    path: Place
    name: str
    method: Method
    base: str | None

    def models(self, raw: Any) -> tuple[Slice, ...]:
        inputs = self._inputs("models", raw, ("model", "parameters", "statistics"))
        if self.base is not None and all(entry.model != self.base for entry in inputs):
            if self.method.base == "none" and self.method.statistics != "none":
                raise InputError(
                    f"{self.path}: base_model would be one of {self.name}'s models; list it with its statistics"
                )
            inputs.append(Input(self.base, {}, None, None, "base_model"))
        return (self._slice(inputs, self.base, {}, "models"),)

    def slices(self, raw: Any) -> tuple[Slice, ...]:
        return tuple(self._sources(key, item) for key, item in document.items(self.path, "slices", raw))

    def _sources(self, key: str, raw: Mapping[str, Any]) -> Slice:
        document.known(f"{self.path}: {key}.", raw, ("sources", "base_model", "parameters"))
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
            base = document.text(f"{self.path}: {key}.base_model", raw["base_model"])
            if self.method.base == "none":
                raise InputError(f"{self.path}: {key}.base_model does nothing with {self.name}; list it as a source")
        if base is not None and self.method.base != "none" and all(entry.model != base for entry in inputs):
            raise InputError(
                f"{self.path}: {key}.sources lack the base {shown(base)}; list it with the layer_range to measure from"
            )
        where = f"{self.path}: {key}.parameters"
        found = settings.read(where, raw.get("parameters"), {**self.method.each, **self.method.shared}, {}, self.name)
        return self._slice(inputs, base, found, key)

    def _slice(self, inputs: list[Input], base: str | None, found: Settings, key: str) -> Slice:
        if self.method.base == "none":
            base = None
        if self.method.base == "required" and base is None:
            raise InputError(f"{self.path}: base_model is missing; {self.name} measures the models' changes from it")
        models = tuple(entry for entry in inputs if entry.model != base)
        low, high = self.method.models
        if len(models) < low or (high is not None and len(models) > high):
            expected = f"{low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
            apart = " besides the base" if base is not None else ""
            raise InputError(f"{self.path}: {key} has {len(models)} model(s){apart}; {self.name} takes {expected}")
        return Slice(next((entry for entry in inputs if entry.model == base), None), models, found, key)

    def _inputs(self, key: str, raw: Any, known: Collection[str]) -> list[Input]:
        found: dict[str, Input] = {}
        for where, item in document.items(self.path, key, raw):
            document.known(f"{self.path}: {where}.", item, known)
            if item.get("model") is None:
                raise InputError(f"{self.path}: {where} lacks 'model'; write model: PATH[@REVISION][+ADAPTER]")
            model = document.text(f"{self.path}: {where}.model", item["model"])
            if model in found:
                raise InputError(f"{self.path}: {where}.model is {shown(model)}, as {found[model].key}; list it once")
            parameters = settings.read(
                f"{self.path}: {where}.parameters",
                item.get("parameters"),
                self.method.each,
                self.method.shared,
                self.name,
            )
            layers = _range(f"{self.path}: {where}", item.get("layer_range")) if "layer_range" in known else None
            statistics = item.get("statistics")
            if statistics is None and self.method.statistics != "none":
                raise InputError(
                    f"{self.path}: {where} lacks 'statistics'; {self.name} needs FILE.safetensors, collected from its data"
                )
            if statistics is not None:
                if self.method.statistics == "none":
                    raise InputError(f"{self.path}: {where}.statistics does nothing with {self.name}; leave it out")
                written = stores.place(document.text(f"{self.path}: {where}.statistics", statistics))
                beside = written if stores.remote(written) else self.path.parent / written
                statistics = stores.local(beside if _exists(beside) or not _exists(written) else written)
            found[model] = Input(model, parameters, layers, statistics, where)
        return list(found.values())


def _method(path: Place, raw: Mapping[str, Any]) -> tuple[str, Method]:
    """Return the method's name, and the method with the options of another where it goes on top of one."""
    if "merge_method" not in raw:
        raise InputError(f"{path}: merge_method is missing; expected one of {', '.join(METHODS)}")
    name = document.text(f"{path}: merge_method", raw["merge_method"])
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
        return name, find(name, {"method": document.text(f"{path}: parameters.method", inner)})
    except InputError as error:
        where = f"{path}: parameters.method"
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _seed(path: Place, raw: Any, name: str, method: Method, parameters: Settings) -> settings.Setting:
    if "seed" not in method.shared:
        raise InputError(f"{path}: seed does nothing with {name}, which draws no random numbers; leave it out")
    if "seed" in parameters:
        raise InputError(f"{path}: has both 'seed' and 'parameters.seed'; keep one")
    return (settings.Choice(None, (settings.scalar(f"{path}: seed", raw, method.shared["seed"]),)),)


def _complete(path: Place, name: str, method: Method, part: Slice, parameters: Settings) -> None:
    """Raise where an option without default is set nowhere."""
    everywhere = {*parameters, *part.parameters}
    for key, option in method.shared.items():
        if option.default is None and key not in everywhere:
            raise InputError(f"{path}: parameters.{key} is missing; {name} needs it: {option.help}")
    for key, option in method.each.items():
        for entry in part.models:
            if option.default is None and key not in everywhere and key not in entry.parameters:
                where = f"{entry.key}.parameters.{key}" if entry.key != "base_model" else f"parameters.{key}"
                raise InputError(f"{path}: {where} is missing for {shown(entry.model)}; {name} needs it: {option.help}")


def _range(where: str, raw: Any) -> tuple[int, int]:
    if raw is None:
        raise InputError(f"{where} lacks 'layer_range'; write layer_range: [FIRST, LAST + 1]")
    good = isinstance(raw, list) and len(raw) == 2 and all(type(end) is int for end in raw)
    if not good or not 0 <= raw[0] < raw[1] < 1_000_000:
        found = ", ".join(shown(end) for end in raw[:3]) if isinstance(raw, list) else shown(raw)
        raise InputError(
            f"{where}.layer_range is [{found}]; expected [FIRST, LAST + 1], whole numbers, the second larger"
        )
    return raw[0], raw[1]


def _exists(path: Place) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _dtype(where: str, raw: Any) -> str | None:
    if raw is None:
        return None
    name = document.text(where, raw).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"{where} is {shown(raw)}{did_you_mean(name, DTYPES)}; expected one of {', '.join(DTYPES)}")
    return name
