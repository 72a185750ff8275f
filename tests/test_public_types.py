"""The types of the public names, as the type checker of a user in strict mode sees them."""

import importlib
import json
import types

import pytest

import typechecks

PACKAGES = ("dsee_jax", "dsee_jax.deltas", "dsee_jax.generation", "dsee_jax.nnx", "dsee_jax.prune")

FLAX = {"dsee_jax.nnx.Delta", "dsee_jax.nnx.Support"}
"""Classes of a metaclass of Flax without a type."""

USER = """
# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
from typing import assert_type

import flax.linen as nn
import jax
import optax
from flax import nnx

import dsee_jax
from dsee_jax import Adapter, deltas, masks, models, prune

Params = dict[str, jax.Array]


def linen(model: nn.Module, params: Params, x: jax.Array, key: jax.Array) -> None:
    config = dsee_jax.DeltaConfig(targets=[("q", {"orientation": "out_in"}), "v"], rank=2)
    adapter = assert_type(deltas.init(params, config, key=key), Adapter)
    assert_type(adapter.replace(scale=2.0), Adapter)
    dsee_jax.apply(model, params, adapter, x)
    with dsee_jax.attached(adapter):
        model.apply({"params": params}, x)
    assert_type(dsee_jax.materialize(params, adapter), Params)
    kept = prune.unstructured(params, adapter, [("q", True), ("v", {"sparsity": 0.3})], score="WABS", scope="tensor", key=key)
    prune.nm(params, None, ["q"], n=2, m=4)
    assert_type(masks.apply(params, kept), Params)
    optax.chain(optax.adamw(1e-3), masks.keep(kept))
    prune.unstructured(params, None, ["q"], scope="tensr")  # pyright: ignore[reportArgumentType]
    prune.unstructured(params, None, ["q"], score="WABSS")  # pyright: ignore[reportArgumentType]
    prune.unstructured(params, None, ["q"], sprsity=0.5)  # pyright: ignore[reportCallIssue]
    prune.unstructred  # pyright: ignore
    Adapter(adapter.deltas, adapter.supports)  # pyright: ignore[reportCallIssue]
    Adapter(adapter.deltas, adapter.supports, 2.0)  # pyright: ignore[reportCallIssue]


def module(module: nnx.Linear, adapter: Adapter) -> None:
    assert_type(dsee_jax.nnx.attach(module, adapter), nnx.Linear)
    assert_type(dsee_jax.nnx.adapter(module), Adapter)


def pretrained(tokens: jax.Array, adapter: Adapter) -> None:
    model, params = dsee_jax.load_pretrained("folder", num_labels=2)
    kept = prune.structured(params, adapter, models.cuts(model), heads=0.25, neurons=3)
    model, params = dsee_jax.compact(model, params, kept)
    assert_type(dsee_jax.generate(model, params, tokens, tokens, new_tokens=3, adapter=adapter), jax.Array)
    dsee_jax.save_pretrained("folder", model, params)
"""


@pytest.mark.slow
def test_calls_of_a_user_are_refused_by_the_type_checker(tmp_path):
    """Misspelt names and choices are errors, and so is an adapter without a scale."""
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"reportUnnecessaryTypeIgnoreComment": "error"}))
    done = typechecks.pyright("-p", str(tmp_path))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_types_of_the_public_names_are_unknown():
    report = json.loads(typechecks.pyright("--verifytypes", "dsee_jax", "--ignoreexternal", "--outputjson").stdout)
    public: set[str] = set()
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            member = getattr(package, name)
            if not isinstance(member, types.ModuleType):
                public.add(f"{member.__module__}.{member.__qualname__}")
            elif not hasattr(member, "__all__"):
                public.add(member.__name__)
    symbols = [
        symbol
        for symbol in report["typeCompleteness"]["symbols"]
        if symbol["isExported"] and (symbol["name"] in public or symbol["name"].rpartition(".")[0] in public)
    ]
    assert len(symbols) > 150
    assert {symbol["name"] for symbol in symbols if not symbol["isTypeKnown"]} <= FLAX
