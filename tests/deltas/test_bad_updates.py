"""Bad updates: one line that names the path, the value, the expectation and the fix."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsee_jax
from dsee_jax.errors import InputError
from updated import KEY, Model, X, made


def oriented(pattern, orientation):
    return (pattern, {"orientation": orientation})


def one_line(error):
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("dens",), r"rule 'dens' matches nothing: .*be the end of one: dense, heads"),
        (("heads",), r"'heads/kernel' has the shape \(6, 2, 3\).* needs an orientation"),
        (
            (oriented("heads", "in_out"),),
            r"'heads/kernel' is 'in_out' .*\(6, 2, 3\); expected one word for each",
        ),
        ((oriented("heads", "out_out_out"),), r"'heads/kernel' is 'out_out_out' .* at least one in and one out"),
        ((oriented("heads", "in_1_out"),), r"'heads/kernel' is 'in_1_out' .*\(6, 2, 3\).*1 \(of length 1\)"),
        ((oriented("heads", "in_head_out"),), r"'in_head_out' .* of stack, in, out, 1"),
        ((oriented("dense", ""),), r"'dense/kernel' is '' "),
        ((oriented("dense", 2),), r"'dense/kernel' is 2 "),
        ((".*nse", oriented("dense/kernel", "out_in")), r"matches nothing"),
        (
            (oriented(".*/kernel", "in_out"), oriented("dense/kernel", "out_in")),
            "'.*/kernel' and 'dense/kernel' both match 'dense/kernel', with the orientations in_out and out_in",
        ),
        (("dense/bias",), r"'dense/bias', which is float32\(6,\); expected a kernel"),
    ],
)
def test_a_target_that_takes_no_update_is_named(targets, message):
    with pytest.raises(InputError, match=message) as error:
        made(targets=targets)
    one_line(error)


@pytest.mark.parametrize("rule", [("dense",), ("dense", "out_in"), ("dense", {"orient": "out_in"}), (1, {}), None])
def test_a_rule_of_another_form_is_named(rule):
    with pytest.raises(InputError, match=r"delta.targets.*expected") as error:
        dsee_jax.DeltaConfig(targets=(rule,))
    one_line(error)


def test_a_convolution_of_more_than_one_entry_is_refused_when_its_update_is_created():
    with pytest.raises(InputError, match=r"'kernel' has the shape \(3, 3, 4, 5\).*needs an orientation"):
        made(nn.Conv(5, (3, 3)), ("kernel",), jnp.ones((1, 3, 3, 4)))
    with pytest.raises(InputError, match=r"'kernel' is '1_1_in_out' and its shape is \(3, 3, 4, 5\)"):
        made(nn.Conv(5, (3, 3)), (oriented("kernel", "1_1_in_out"),), jnp.ones((1, 3, 3, 4)))


@pytest.mark.parametrize(
    ("model", "found", "expected", "path"),
    [
        (nn.Dense(4), "out_in", "in_out", "kernel"),
        (nn.DenseGeneral((2, 3)), "in_in_out", "in_out_out", "kernel"),
        (nn.Einsum((2, 4, 3), "bd,ndh->bnh"), "in_in_out", "out_in_out", "kernel"),
        (nn.Conv(3, 1), "stack_in_out", "1_in_out", "kernel"),
        (nn.MultiHeadDotProductAttention(num_heads=2), "in_in_out", "in_out_out", "query/kernel"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_an_orientation_that_is_not_that_of_the_module_is_named(model, found, expected, path):
    x = jnp.ones((2, 4)) if not isinstance(model, nn.Conv) else jnp.ones((2, 3, 4))
    params, adapter = made(model, (oriented(path, found),), x)
    message = f"the orientation of '{path}' is '{found}'.*by it as '{expected}'.*give its rule"
    with pytest.raises(InputError, match=message) as error:
        dsee_jax.apply(model, params, adapter, x)
    one_line(error)


def other(tree, **parts):
    return {"dense": {"kernel": {**tree["dense"]["kernel"], **parts}}}


@pytest.mark.parametrize("by", ["apply", "materialize", "prune", "jit"])
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": jnp.ones((4, 1))}, r"'b' of shape \(2, 6\).*needs \(1, 6\)"),
        ({"a": jnp.ones((1, 2))}, r"'a' of shape \(1, 2\).*needs \(4, 2\)"),
        ({"a": jnp.ones(2)}, r"'a' of shape \(2,\).*needs \(4, 2\)"),
        ({"b": jnp.ones((2, 1))}, r"'b' of shape \(2, 1\).*needs \(2, 6\)"),
        ({"b": jnp.ones((3, 6))}, r"'b' of shape \(3, 6\).*needs \(2, 6\)"),
        ({"values": jnp.ones((1,))}, r"'support' of shape \(3, 2\).*needs \(1, 2\)"),
        ({"values": jnp.ones((3, 1))}, r"stack_in_out.* and its shape is \(4, 6\)"),
    ],
)
def test_misshapen_arrays_are_named(parts, message, by):
    params, adapter = made()
    adapter = adapter.replace(deltas=other(adapter.deltas, **parts))
    calls = {
        "apply": lambda: dsee_jax.apply(Model(), params, adapter, X),
        "materialize": lambda: dsee_jax.materialize(params, adapter),
        "prune": lambda: dsee_jax.prune.unstructured(params, adapter, ["dense"]),
        "jit": lambda: jax.jit(lambda adapter: dsee_jax.apply(Model(), params, adapter, X))(adapter),
    }
    with pytest.raises(InputError, match=f"dense/kernel.*{message}") as error:
        calls[by]()
    one_line(error)


@pytest.mark.parametrize("shape", [(2, 2), (3, 1), (3,), (6, 2)])
def test_a_misshapen_support_is_named(shape):
    params, adapter = made()
    adapter = adapter.replace(supports={"dense": {"kernel": jnp.zeros(shape, jnp.int32)}})
    for call in (lambda: dsee_jax.apply(Model(), params, adapter, X), lambda: dsee_jax.materialize(params, adapter)):
        with pytest.raises(InputError, match=r"'dense/kernel' has 'support' of shape .* needs \(3, 2\)"):
            call()


@pytest.mark.parametrize(
    ("names", "supported", "message"),
    [
        (("a", "values"), True, "'dense/kernel' has 'a' and no 'b'"),
        (("b", "values"), True, "'dense/kernel' has 'b' and no 'a'"),
        (("a", "b", "values"), False, "'dense/kernel' has values and no support"),
        (("a", "b"), True, "'dense/kernel' has a support and no values"),
    ],
)
def test_an_array_that_is_missed_is_named(names, supported, message):
    params, adapter = made()
    part = {name: adapter.deltas["dense"]["kernel"][name] for name in names}
    supports = adapter.supports if supported else {}
    with pytest.raises(InputError, match=message):
        dsee_jax.apply(Model(), params, adapter.replace(deltas={"dense": {"kernel": part}}, supports=supports), X)


def test_an_adapter_of_another_base_is_named():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(7, name="dense")(x)

    class Renamed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6, name="dense_0")(x)

    _, adapter = made()
    for model, message in (
        (Wide(), r"'dense/kernel' has 'b' of shape \(2, 6\); the kernel of shape \(4, 7\) needs \(2, 7\)"),
        (Renamed(), r"no (such path|'dense/kernel' in the tree) \(did you mean 'dense_0/kernel'"),
    ):
        params = model.init(KEY, X)["params"]
        with pytest.raises(InputError, match=message):
            dsee_jax.apply(model, params, adapter, X)
        with pytest.raises(InputError, match=message):
            dsee_jax.materialize(params, adapter)


def test_supports_of_another_adapter_are_named():
    params, adapter = made()
    _, longer = made(nonzeros=4)
    _, elsewhere = made(targets=(oriented("heads", "in_out_out"),))
    with pytest.raises(InputError, match=r"'support' of shape \(4, 2\).*needs \(3, 2\)"):
        dsee_jax.materialize(params, adapter.replace(supports=longer.supports))
    with pytest.raises(
        InputError, match=r"'dense/kernel' has values and no support|'heads/kernel' has a support and no values"
    ):
        dsee_jax.materialize(params, adapter.replace(supports=elsewhere.supports))


@pytest.mark.parametrize("scale", ["2.0", None, True, float("nan"), float("inf"), np.ones(2), jnp.ones(1), 1j])
def test_a_scale_that_is_no_number_is_named(scale):
    with pytest.raises(InputError, match="the scale of an adapter is .*expected a finite number"):
        dsee_jax.Adapter({}, {}, scale, True)
    with pytest.raises(InputError, match="the scale of an adapter"):
        dsee_jax.Adapter({}, {}, 1.0, True).replace(scale=scale)


def test_a_scale_may_be_any_number_and_traced():
    params, adapter = made()
    outputs = [
        jax.jit(lambda adapter: dsee_jax.apply(Model(), params, adapter, X))(adapter.replace(scale=scale))
        for scale in (2, 2.0, np.float32(2), jnp.float32(2))
    ]
    traced = jax.jit(lambda scale: dsee_jax.apply(Model(), params, adapter.replace(scale=scale), X))(2.0)
    for output in outputs:
        np.testing.assert_allclose(output, traced, rtol=1e-6)


def test_deltas_of_another_rank_need_their_own_scale():
    """The scale is alpha / rank."""
    params, adapter = made()
    other = dsee_jax.deltas.init(params, dsee_jax.DeltaConfig(["dense"], rank=1, nonzeros=0), key=jax.random.key(0))
    with pytest.raises(
        InputError, match=r"'dense/kernel' has the rank 1 and the adapter the rank \d.*: give the scale too"
    ):
        adapter.replace(deltas=other.deltas)
    assert adapter.replace(deltas=other.deltas, supports={}, scale=other.scale).scale == other.scale
