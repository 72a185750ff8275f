"""The recipe of a merge: mergekit's YAML grammar, strictly checked, and a few keys of this package.

`read` has a helper for each mapping of the file. The methods and their parameters are those of ``merge.methods.METHODS``; the
keys that are read, ignored and refused are those of `merge.recipes.keys`.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax.errors import InputError, did_you_mean
from dsee_jax.runtime import input_file, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.runtime.strict_yaml import shown
from merge.method import Method
from merge.methods import METHODS, find
from merge.recipes import chat_templates, keys, reference, settings, values, vocabulary
from merge.recipes.keys import Notes
from merge.recipes.settings import Settings
from merge.recipes.vocabulary import Tokenizer

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""The types that a recipe may name, and their names in safetensors."""


class Input(NamedTuple):
    """One model of a slice."""

    model: str  # the reference as written
    parameters: Settings
    layers: tuple[int, int] | None  # [first, last + 1), perhaps empty; None: all
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
    chat_template: str | None  # auto, or the text of a template
    content: Mapping[str, Any]  # the parsed YAML
    notes: tuple[str, ...]  # remarks on keys and parameters without effect

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


def read(path: str | os.PathLike[str], *, seed: int | None = None) -> Recipe:
    """Return the checked recipe of a YAML file.

    Args:
      path: the file; at most 1 MB.
      seed: of the method's random numbers, in place of the recipe's.

    Raises:
      InputError: the file is not YAML; a key, method or parameter is unknown, unsupported, missing or contradictory; or a
        value is invalid. The message is one line that names the file and the key path.
    """
    path = storage.as_path(path)
    text, raw, holders = values.read(path)
    if not isinstance(raw, dict):
        content = "is empty" if raw is None else f"holds {shown(raw)} at its top"
        raise InputError(f"{path}: {content}; expected keys such as 'merge_method:' and 'models:'")
    notes = Notes()
    # A further key may hold what aliases refer to.
    raw = {key: value for key, value in raw.items() if key in keys.KNOWN or key not in holders}
    keys.check(str(path), raw, keys.TOP, notes)
    raw = {key: value for key, value in raw.items() if value is not None}
    if seed is not None:
        raw = _seeded(raw, seed)
    content = raw
    raw, module, prefix = _module(path, raw, notes)
    name, method = _method(path, raw)
    base = reference.text(f"{path}: base_model", raw["base_model"]) if "base_model" in raw else None
    reader = _Reader(path, name, method, base, notes, {}, prefix)
    top, own = reader.parameters("parameters", raw.get("parameters")), reader.parameters(f"{prefix}parameters", module)
    parameters = {key: own.get(key, ()) + top.get(key, ()) for key in {**own, **top}}
    if "seed" in raw and "seed" in method.shared:
        if "seed" in parameters:
            raise InputError(f"{path}: has both 'seed' and 'parameters.seed'; keep one")
        parameters["seed"] = (
            settings.Choice(None, (settings.scalar(f"{path}: seed", raw["seed"], method.shared["seed"]),)),
        )
    elif "seed" in raw:
        notes.ignored("seed", f"{name} draws no random numbers")
    forms = [form for form in ("models", "slices") if form in raw]
    if len(forms) != 1:
        problem = "has both 'models' and 'slices'" if forms else "has neither 'models' nor 'slices'"
        raise InputError(f"{path}: {problem}; expected one of them")
    slices = reader.models(raw["models"]) if forms == ["models"] else reader.slices(raw["slices"])
    for part in slices:
        _check_required(path, name, method, part, parameters)
        _check_shared(path, name, method, part, parameters)
    keys.unused(reader.unused, name, notes)
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
        _tokenizer(path, raw, notes),
        _chat_template(f"{path}: chat_template", raw.get("chat_template")),
        content,
        tuple(notes),
    )


def statistics_file(path: Place, written: str) -> Place:
    """Return the place of a file of statistics: beside the recipe at ``path``, in the working folder, or in a store."""
    file = storage.as_path(written)
    beside = file if storage.remote(file) else path.parent / file
    return beside if _exists(beside) or not _exists(file) else file


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Return the content of a recipe that runs again: plain dicts, lists and scalars, with the defaults of the whole merge."""
    options = {key: option.default for key, option in recipe.method.shared.items() if option.default is not None}
    given = dict(recipe.content.get("parameters") or {})
    content = dict(recipe.content)
    if "seed" in options and "seed" in content:
        given["seed"] = content.pop("seed")
    return content | {"parameters": options | given}


def _module(path: Place, raw: dict[str, Any], notes: Notes) -> tuple[dict[str, Any], Any, str]:
    """Return the recipe with the only module's models or slices at its top, the module's parameters, and its key path."""
    modules = raw.get("modules")
    if modules is None:
        return raw, None, ""
    if not isinstance(modules, dict) or not all(isinstance(module, dict) for module in modules.values()):
        raise InputError(f"{path}: modules is {shown(modules)}; expected 'default:' with models or slices")
    if [*modules] != ["default"]:
        listed = ", ".join(shown(name)[1:-1] for name in [*modules][:4]) or "none"
        raise InputError(
            f"{path}: modules has {listed}; only 'default', the whole model, is supported, not models of several modules: "
            "write 'models:' to merge all modules alike"
        )
    if "models" in raw or "slices" in raw:
        raise InputError(f"{path}: has 'modules' beside 'models' or 'slices'; expected one of them")
    (module,) = modules.values()
    keys.check(str(path), module, keys.MODULE, notes, "modules.default.")
    module = {key: value for key, value in module.items() if value is not None}
    parameters = module.pop("parameters", None)
    top = {key: value for key, value in raw.items() if key != "modules"}
    return top | module, parameters, "modules.default."


def _seeded(raw: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the recipe with ``seed`` at its top only."""
    parameters = raw.get("parameters")
    if isinstance(parameters, dict):
        raw = {**raw, "parameters": {key: value for key, value in parameters.items() if key != "seed"}}
    return {**raw, "seed": seed}


def _tokenizer(path: Place, raw: Mapping[str, Any], notes: Notes) -> Tokenizer | None:
    if "tokenizer" in raw and "tokenizer_source" in raw:
        raise InputError(
            f"{path}: has both 'tokenizer' and 'tokenizer_source'; keep one (tokenizer.source says the same)"
        )
    if "tokenizer" in raw:
        return vocabulary.read(str(path), raw["tokenizer"], notes)
    if "tokenizer_source" in raw:
        return Tokenizer(reference.text(f"{path}: tokenizer_source", raw["tokenizer_source"]))
    return None


def _chat_template(where: str, raw: Any) -> str | None:
    return None if raw is None else chat_templates.resolve(where, values.text(where, raw, input_file.LARGEST))


class _Reader(NamedTuple):
    """The fields that the readers of models and slices share."""

    path: Place
    name: str
    method: Method
    base: str | None
    notes: Notes
    unused: settings.Unused
    prefix: str  # the key path of the module, with a dot at its end, or empty

    def parameters(self, key: str, raw: Any) -> Settings:
        options = {**self.method.each, **self.method.shared}
        return settings.read(str(self.path), key, raw, options, self.name, self.unused)

    def check(self, key: str, raw: Mapping[str, Any], known: Collection[str]) -> None:
        keys.check(str(self.path), raw, known, self.notes, f"{key}.")

    def models(self, raw: Any) -> tuple[Slice, ...]:
        inputs = self._inputs(f"{self.prefix}models", raw, keys.MODEL)
        if self.base is not None and all(entry.model != self.base for entry in inputs):
            if self.method.base == "none" and self.method.statistics != "none":
                raise InputError(
                    f"{self.path}: base_model counts as one of {self.name}'s models; list it with its statistics"
                )
            inputs.append(Input(self.base, {}, None, None, "base_model"))
        return (self._slice(inputs, self.base, {}, f"{self.prefix}models"),)

    def slices(self, raw: Any) -> tuple[Slice, ...]:
        items = values.items(self.path, f"{self.prefix}slices", raw)
        slices = tuple(self._sources(key, item) for key, item in items)
        if not any(first < last for part in slices for first, last in [part.inputs[0].layers or (0, 0)]):
            raise InputError(
                f"{self.path}: {self.prefix}slices have no layers; expected a layer_range that is not empty"
            )
        return slices

    def _sources(self, key: str, raw: Mapping[str, Any]) -> Slice:
        self.check(key, raw, keys.SLICE)
        if raw.get("sources") is None:
            raise InputError(f"{self.path}: {key} lacks 'sources'; write a list of models with their layer_range")
        inputs = self._inputs(f"{key}.sources", raw["sources"], keys.SOURCE)
        lengths = {entry.layers[1] - entry.layers[0] for entry in inputs if entry.layers}
        if len(lengths) > 1:
            listed = ", ".join(f"{entry.model} {list(entry.layers or ())}" for entry in inputs)
            raise InputError(
                f"{self.path}: {key}.sources take different numbers of layers: {listed}; expected the same"
            )
        base = self.base
        if raw.get("base_model") is not None:
            base = reference.text(f"{self.path}: {key}.base_model", raw["base_model"])
            if self.method.base == "none":
                self.notes.ignored(f"{key}.base_model", f"{self.name} measures no changes from a base")
        if base is not None and self.method.base != "none" and all(entry.model != base for entry in inputs):
            raise InputError(
                f"{self.path}: {key}.sources lack the base {shown(base)}; list it with the layer_range to measure from"
            )
        return self._slice(inputs, base, self.parameters(f"{key}.parameters", raw.get("parameters")), key)

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

    def _inputs(self, key: str, raw: Any, known: Collection[str]) -> list[Input]:
        inputs: dict[str, Input] = {}
        for where, item in values.items(self.path, key, raw):
            self.check(where, item, known)
            if item.get("model") is None:
                raise InputError(f"{self.path}: {where} lacks 'model'; write model: PATH[@REVISION][+ADAPTER]")
            model = reference.text(f"{self.path}: {where}.model", item["model"])
            if model in inputs:
                raise InputError(f"{self.path}: {where}.model is {shown(model)}, as {inputs[model].key}; list it once")
            parameters = self.parameters(f"{where}.parameters", item.get("parameters"))
            layers = _layer_range(f"{self.path}: {where}", item.get("layer_range")) if "layer_range" in known else None
            statistics = item.get("statistics")
            if statistics is None and self.method.statistics != "none":
                raise InputError(
                    f"{self.path}: {where} lacks 'statistics'; {self.name} needs FILE.safetensors, collected from its data"
                )
            if statistics is not None:
                if self.method.statistics == "none":
                    raise InputError(f"{self.path}: {where}.statistics has no effect on {self.name}; leave it out")
                written = values.text(f"{self.path}: {where}.statistics", statistics)
                statistics = storage.download(statistics_file(self.path, written))
            inputs[model] = Input(model, parameters, layers, statistics, where)
        return list(inputs.values())


def _method(path: Place, raw: Mapping[str, Any]) -> tuple[str, Method]:
    """Return the method's name and the method; a method over another method has the options of both."""
    if "merge_method" not in raw:
        raise InputError(f"{path}: merge_method is missing; expected one of {', '.join(METHODS)}")
    name = values.text(f"{path}: merge_method", raw["merge_method"])
    if name not in METHODS:
        raise InputError(
            f"{path}: merge_method is {shown(name)}{did_you_mean(name, METHODS)}; expected one of {', '.join(METHODS)}"
        )
    parameters = raw.get("parameters")
    inner = parameters.get("method") if isinstance(parameters, dict) else None
    if inner is None or "method" not in METHODS[name].shared:
        return name, METHODS[name]
    try:
        return name, find(name, {"method": values.text(f"{path}: parameters.method", inner)})
    except InputError as error:
        where = f"{path}: parameters.method"
        raise InputError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


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


def _check_shared(path: Place, name: str, method: Method, part: Slice, parameters: Settings) -> None:
    """Raise `InputError` for an option of the whole merge that has another value beside one model."""
    for entry in part.models:
        for key in entry.parameters.keys() & method.shared.keys():
            option, own = method.shared[key], entry.parameters[key]
            whole = part.parameters.get(key) or parameters.get(key) or (settings.Choice(None, (option.default,)),)
            if option.effect and own != whole:
                raise InputError(
                    f"{path}: {entry.key}.parameters.{key} is {_shown(own)}, and {_shown(whole)} for the whole merge, which "
                    f"has one {key} under {name}: write it in the top's parameters only"
                )


def _shown(setting: settings.Setting) -> str:
    first = setting[0]
    return (
        shown(first.values[0]) if len(setting) == len(first.values) == 1 and first.filter is None else "another setting"
    )


def _layer_range(where: str, raw: Any) -> tuple[int, int]:
    if raw is None:
        raise InputError(f"{where} lacks 'layer_range'; write layer_range: [FIRST, LAST + 1]")
    valid = isinstance(raw, list) and len(raw) == 2 and all(type(end) is int for end in raw)
    if not valid or not 0 <= raw[0] <= raw[1] < 1_000_000:
        ends = ", ".join(shown(end) for end in raw[:3]) if isinstance(raw, list) else shown(raw)
        raise InputError(
            f"{where}.layer_range is [{ends}]; expected [FIRST, LAST + 1], whole numbers, the second not smaller"
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
    name = values.text(where, raw).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"{where} is {shown(raw)}{did_you_mean(name, DTYPES)}; expected one of {', '.join(DTYPES)}")
    return name
