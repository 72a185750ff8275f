"""Paths and rules of trees: every path needs a rule, and every rule a path."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsee_jax import tree
from dsee_jax.errors import InputError

TREE = {"encoder": {"layer_1": {"kernel": 1, "bias": 2}, "layer_0": {"kernel": 3}}, "head": {"kernel": 4}}
names = st.text("abc", min_size=1, max_size=3)
nested = st.recursive(st.integers(), lambda child: st.dictionaries(names, child, min_size=1, max_size=3), max_leaves=8)
trees = st.dictionaries(names, nested, min_size=1, max_size=3)


def test_flatten_sorts_keys_as_jax_does():
    assert list(tree.flatten(TREE).items()) == [
        ("encoder/layer_0/kernel", 3),
        ("encoder/layer_1/bias", 2),
        ("encoder/layer_1/kernel", 1),
        ("head/kernel", 4),
    ]


@given(trees)
def test_unflatten_inverts_flatten(value):
    assert tree.unflatten(tree.flatten(value)) == value


@given(trees, st.randoms())
def test_join_inverts_split(value, random):
    paths = list(tree.flatten(value))
    chosen, rest = tree.split(value, random.sample(paths, random.randint(0, len(paths))))
    assert tree.join(chosen, rest) == value


def test_first_matching_rule_wins():
    paths = ["encoder/layer_0/kernel", "encoder/layer_1/kernel", "head/kernel"]
    rules = [("encoder/layer_0/.*", "a"), (".*/kernel", "b")]
    assert tree.assign(rules, paths) == dict(zip(paths, "abb", strict=True))
    assert tree.assign([("head/.*", 1)], paths, default=0) == dict(zip(paths, (0, 0, 1), strict=True))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("encoder/.*", 1)], "no rule matches 'head/kernel'"),
        ([(".*", 1), ("head/.*", 2)], "'head/.*' matches nothing: earlier rules match all of its paths"),
        ([("head/kernl", 2), (".*", 1)], "did you mean 'head/kernel'"),
        ([("hea", 2), (".*", 1)], "must match a complete path.*or be the end of one: layer_0, layer_1, head"),
        ([("q_proj", 2), (".*", 1)], "such as 'encoder/layer_0/kernel', or be the end"),
        ([("(", 1)], r"'\(' is not a regular expression"),
    ],
)
def test_uncovered_path_and_unused_rule_are_errors(rules, message):
    with pytest.raises(InputError, match=message):
        tree.assign(rules, tree.flatten(TREE))


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        ("query", ["a/query/kernel", "b/query/kernel"]),
        ("a/query", ["a/query/kernel"]),
        ("query/kernel", ["a/query/kernel", "b/query/kernel"]),
        ("a/query/kernel", ["a/query/kernel"]),
        ("bias", ["a/query/bias"]),
        ("head", ["head"]),
        (".*query", None),
        ("uery", None),
        ("a", None),
    ],
)
def test_plain_rule_is_the_end_of_a_path(rule, matched):
    """A rule that is a complete path is that path alone."""
    paths = ["a/query/kernel", "a/query/bias", "a/long_query/kernel", "b/query/kernel", "b/head/kernel", "head"]
    if matched is None:
        with pytest.raises(InputError, match="matches nothing"):
            tree.select([rule], paths)
    else:
        assert tree.select([rule], paths) == matched


def test_select_keeps_the_order_of_paths():
    paths = list(tree.flatten(TREE))
    assert tree.select([".*/kernel", "encoder/.*"], paths) == paths
    with pytest.raises(InputError, match="matches nothing"):
        tree.select(["encoder/.*", "decoder/.*"], paths)


def test_replace_changes_the_given_paths_only():
    assert tree.replace(TREE, {"head/kernel": 14}) == TREE | {"head": {"kernel": 14}}
    with pytest.raises(InputError, match=r"no 'haed/kernel'.*did you mean 'head/kernel'"):
        tree.replace(TREE, {"haed/kernel": 0})


def test_path_in_two_trees_cannot_be_joined():
    with pytest.raises(InputError, match="'head/kernel' is in two"):
        tree.join(TREE, {"head": {"kernel": np.zeros(2)}})
