"""Statistics of the inputs of kernels equal NumPy's, example by example."""

import functools

import flax.linen as nn
import jax
import numpy as np

import decoders
import tiny
from dsee_jax import stacks, tree
from dsee_jax.ckpt import hf, hf_names
from dsee_jax.ops.joint import JointDense
from dsee_jax.prune import calibration
from examples import alone, case


def captured(model):
    """Return a compiled ``(params, example)`` that gives the inputs of every Dense and joint projection, as (tokens, in)."""

    def run(params, example):
        seen = {}

        def intercept(call, args, kwargs, context):
            module = context.module
            if context.method_name == "__call__" and isinstance(module, (nn.Dense, JointDense)):
                for name in getattr(module, "joint", ("",)):
                    path = "/".join([*module.path, *([name] if name else []), "kernel"])
                    seen[path] = args[0].reshape(-1, args[0].shape[-1])
            return call(*args, **kwargs)

        with nn.intercept_methods(intercept):
            model.apply({"params": params}, **example, deterministic=True)
        return seen

    return jax.jit(run)


def compiled(function, model):
    """Return `calibration.gram` or `calibration.squares` of a model, as one program."""
    return jax.jit(functools.partial(function, model))


def test_gram_equals_numpy_without_padding(tmp_path):
    """Padding and filler rows do not count; the last layer computes only the first position of each example."""
    model, params, batch = case(tmp_path / "hf", layers=2)
    sums = compiled(calibration.gram, model)(params, batch)
    capture = captured(model)
    inputs = [capture(params, alone(batch, row)) for row in range(3)]
    kernels = [path for path in tree.flatten(params) if path.endswith("/kernel")]
    assert sorted(sums) == sorted(kernels)
    for path, part in sums.items():
        x = np.concatenate([seen[path] for seen in inputs]).astype(np.float64)
        assert int(part["count"]) == len(x)
        np.testing.assert_allclose(part["sum"], x.T @ x, rtol=1e-4, atol=1e-4, err_msg=path)
    tokens = int(batch["attention_mask"][:3].sum())
    assert int(sums["encoder/layer_0/mlp/up/kernel"]["count"]) == tokens
    assert int(sums["encoder/layer_1/mlp/up/kernel"]["count"]) == int(sums["classifier/kernel"]["count"]) == 3


def test_gram_counts_distance_embeddings_once_per_batch(tmp_path):
    """Kernels that share a tensor share its input, and so its matrix."""
    model, params, batch = case(tmp_path / "hf", family="deberta")
    gram = compiled(calibration.gram, model)
    sums = gram(params, batch)
    rows = np.asarray(params["encoder"]["distance"]["embedding"], np.float64)
    for name in ("position_key", "position_query"):
        part = sums[f"encoder/layer_0/attention/{name}/kernel"]
        assert int(part["count"]) == 10
        np.testing.assert_allclose(part["sum"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    # Of one padded row too, whose own inputs count its tokens.
    padded = int(np.argmin(batch["attention_mask"].sum(1)))
    row = gram(params, {name: each[padded : padded + 1] for name, each in batch.items()})
    part = row["encoder/layer_0/attention/position_key/kernel"]
    assert int(part["count"]) == 10
    np.testing.assert_allclose(part["sum"], rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert (
        int(row["encoder/layer_0/attention/query/kernel"]["count"]) == int(batch["attention_mask"][padded].sum()) < 10
    )
    assert hf_names.names(model).keys() >= sums.keys()
    shared = {"encoder/layer_0/attention/query/kernel", "encoder/layer_0/attention/value/kernel"}
    one, other = (sums[path] for path in shared)
    np.testing.assert_array_equal(one["sum"], other["sum"])


def test_squares_are_the_diagonal_of_gram(tmp_path):
    model, params, batch = case(tmp_path / "hf", layers=2)
    gram, squares = (compiled(each, model)(params, batch) for each in (calibration.gram, calibration.squares))
    assert gram.keys() == squares.keys()
    for path, part in squares.items():
        np.testing.assert_allclose(part["sum"], np.diag(gram[path]["sum"]), rtol=1e-5)
        assert part["count"] == gram[path]["count"]


def test_sizes_cover_all_batches(tmp_path):
    """Batches differ in length; all tokens have the same weight."""
    model, params, batch = case(tmp_path / "hf", layers=2)
    first = alone(batch, 0) | {"weights": batch["weights"][:1]}
    sizes = calibration.sizes(model, params, [first, batch])
    squares = compiled(calibration.squares, model)
    parts = [squares(params, each) for each in (first, batch)]
    for path, size in sizes.items():
        total, count = (sum(np.asarray(part[path][name]) for part in parts) for name in ("sum", "count"))
        np.testing.assert_allclose(size, np.sqrt(total / count), rtol=1e-5)


def test_sizes_of_scanned_layers_equal_those_of_separate_layers(tmp_path):
    decoders.write(tmp_path / "hf", **decoders.VARIANTS["llama"])
    batch = tiny.batch(rows=3, length=8) | {"weights": np.ones((3, 8), np.float32)}
    model, params = hf.load_pretrained(tmp_path / "hf", "causal-lm")
    separate = calibration.sizes(model, params, [batch])
    scanned = calibration.sizes(model.clone(scan=True, remat=True), stacks.stack(params), [batch])
    assert scanned.keys() == {stacks.place(path)[0] for path in separate}
    for path, size in tree.flatten(stacks.stack(tree.unflatten(jax.tree.map(np.asarray, separate)))).items():
        np.testing.assert_allclose(scanned[path], size, rtol=1e-5)
