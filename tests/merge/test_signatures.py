"""Each method as a typed function: the options, defaults and ranges of its table, passed on to `merge.merge`."""

import inspect
import json

import numpy as np
import pytest

import merge
import typechecks
from dsee_jax.errors import InputError
from merge import signatures
from merge.method import KEYWORDS, Method
from merge.methods import METHODS, lines

COMMON = {"base", "models", "statistics", "grams", "coefficients", "options"}
"""Parameters that are no options of a table."""


def options(method: Method) -> dict:
    """The options with an effect, by keyword; those of LiNeS without the options of the method that it works over."""
    table = lines.OPTIONS if method is METHODS["lines"] else {**method.each, **method.shared}
    return {KEYWORDS.get(key, key): option for key, option in table.items() if option.effect}


@pytest.mark.parametrize("name", METHODS)
def test_signature_differs_from_the_table_of_the_method(name):
    function, method = getattr(merge, name), METHODS[name]
    parameters = inspect.signature(function).parameters
    text = " ".join((function.__doc__ or "").split())
    own = {key: parameter for key, parameter in parameters.items() if key not in COMMON}
    assert own.keys() == options(method).keys()
    for key, option in options(method).items():
        default = 1.0 if key == "weight" else option.default
        assert own[key].kind is inspect.Parameter.KEYWORD_ONLY
        assert own[key].default == (inspect.Parameter.empty if default is None else default), key
        assert f"{key}: {option.help}; {option.expected}." in text, key
    statistics = {"elements": {"statistics"}, "grams": {"grams"}, "none": set()}[method.statistics]
    extra = {"rankmean": {"coefficients"}, "lines": {"statistics", "grams", "options"}}.get(name, statistics)
    assert parameters.keys() - own.keys() == {"base", "models"} | extra


@pytest.mark.parametrize("name", METHODS)
def test_typed_function_passes_other_arguments_to_the_general_form(monkeypatch, name):
    """Each argument is an object of its own, which must arrive under its own name."""
    calls = []
    monkeypatch.setattr(signatures, "merge", lambda *arguments, **keywords: calls.append((arguments, keywords)))
    parameters = inspect.signature(getattr(merge, name)).parameters.values()
    base, models = object(), object()
    keywords = {parameter.name: object() for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    if name == "lines":
        keywords["density"] = object()
    getattr(signatures, name)(base, models, **keywords)
    assert calls == [((base, models), {"method": name, **keywords})]


def test_coefficients_of_rankmean_are_ignored():
    base, models = {"layers/0/w": np.zeros(2)}, [{"layers/0/w": np.ones(2)}, {"layers/0/w": np.full(2, 3.0)}]
    merged = merge.rankmean(base, models, coefficients={"0": [0.25, 0.75]})
    np.testing.assert_allclose(merged["layers/0/w"], 2.5)
    with pytest.raises(InputError, match="no coefficients of unit '0'"):
        merge.rankmean(base, models, coefficients={"1": [0.25, 0.75]})


USER = """
# pyright: strict
from typing import assert_type
import jax
import numpy as np
import merge

Params = dict[str, jax.Array]

def use(base: Params, a: Params, b: Params) -> None:
    assert_type(merge.ties(base, [a, b], weight={"0": [0.3, 0.4], ".*": 1}, density=0.3, trim="global"), Params)
    assert_type(merge.merge(base, [a, b], method="ties", weight=np.ones(2), normalize=True, vote={"0": "weighted"}), Params)
    coefficients = merge.rankmean_coefficients(base, [a, b])
    assert_type(merge.linear(None, [a, b], weight=coefficients), Params)
    assert_type(merge.rankmean(base, [a, b], coefficients=coefficients), Params)
    merge.ties(base, [a, b], trim="globl")  # pyright: ignore[reportArgumentType]
    merge.ties(base, [a, b], densty=1)  # pyright: ignore[reportCallIssue]
    merge.tise  # pyright: ignore
"""


@pytest.mark.slow
def test_types_of_the_public_names_are_unknown(tmp_path):
    """Misspelt names, options and choices are errors of the type checker."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"reportUnnecessaryTypeIgnoreComment": "error"}))
    done = typechecks.pyright("-p", str(tmp_path))
    assert done.returncode == 0, done.stdout
    report = json.loads(typechecks.pyright("--verifytypes", "merge", "--ignoreexternal", "--outputjson").stdout)
    files = ("merge.signatures.", "merge.in_memory.", "merge.arguments.", "merge.method.")
    symbols = [symbol for symbol in report["typeCompleteness"]["symbols"] if symbol["name"].startswith(files)]
    assert len(symbols) > 40
    assert [symbol for symbol in symbols if symbol["isExported"] and not symbol["isTypeKnown"]] == []
