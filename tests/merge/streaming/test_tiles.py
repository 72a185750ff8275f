"""For every method, a tensor streamed from files merges as in memory."""

import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError
from merge import topk
from merge.inputs import lazy
from merge.leaf import Whole
from merge.methods import METHODS, find
from merge.streaming import tiles

EACH = {"weight": (0.5, 0.8, 0.3), "density": (0.4, 0.6, 0.9), "gamma": 0.05, "epsilon": 0.05, "scale": 0.5}
SHARED = {"t": 0.3, "lambda": 0.7, "alpha": 0.4, "beta": 0.5, "select_topk": 0.3, "trim": "tensor"}
VARIANTS = [
    *((name, {}) for name in METHODS),
    ("ties", {"trim": "global"}),
    ("ties", {"trim_ties": "keep", "vote": "unweighted"}),
    ("dare_ties", {"rescale_norm": "inverse"}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("model_stock", {"filter_wise": True}),
    ("lines", {"method": "ties"}),
    ("rankmean", {"unit": "tensor", "order": "reversed"}),
]
NAMES = {"model.layers.0.a.weight": (37, 24), "model.layers.1.a.weight": (37, 24), "model.norm.weight": (19,)}


def count(method):
    """The maximum number of models of a method, but not more than three."""
    return min(method.models[1] or 3, 3)


def options(method, overrides, models):
    values = {}
    for key, option in method.each.items():
        value = EACH.get(key, option.default)
        values[key] = tuple(value[:models]) if isinstance(value, tuple) else (value,) * models
    for key, option in method.shared.items():
        values[key] = overrides.get(key, SHARED.get(key, option.default))
    return values


def leaves(tmp_path, method, dtype, by_rows, engine, outputs):
    """The same random tensors as streamed leaves and as leaves in memory."""
    generator = np.random.default_rng(0)
    base = {name: generator.normal(size=shape).astype(dtype) for name, shape in NAMES.items()}
    trees = [base]
    for _ in range(count(method)):
        trees.append({n: (b + generator.normal(size=b.shape) * 0.1).astype(dtype) for n, b in base.items()})
    if method.statistics == "elements":
        trees += [{n: generator.uniform(size=b.shape).astype("float32") for n, b in base.items()} for _ in trees[1:]]
    opened = []
    for number, tree in enumerate(trees):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        tensors.write(folder, tree)
        opened.append({name: lazy.plain(stored) for name, stored in tensors.index(folder).items()})
    base_lazy, *rest = opened
    models, statistics = rest[: count(method)], rest[count(method) :]
    use = method.base != "none"
    streamed, resident = [], []
    for name, shape in NAMES.items():
        outputs[name] = np.full(shape, np.nan, "float32")

        def sink(start, chunk, name=name):
            outputs[name].reshape(-1)[start : start + chunk.size] = chunk

        streamed.append(
            tiles.Tiled(
                name,
                base_lazy[name] if use else None,
                tuple(model[name] for model in models),
                tuple(statistic[name] for statistic in statistics),
                by_rows,
                "F32",
                sink,
                engine,
            )
        )
        arrays = [tree[name] for tree in trees]
        resident.append(
            Whole(
                name,
                arrays[0] if use else None,
                tuple(arrays[1 : 1 + count(method)]),
                tuple(arrays[1 + count(method) :]),
            )
        )
    return streamed, resident


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "overrides"), VARIANTS, ids=lambda value: str(value) if value else "")
def test_streamed_merge_equals_in_memory_merge(tmp_path, monkeypatch, name, overrides, dtype):
    """Tiles of 128 elements split every matrix; thresholds, random choices and ranks do not depend on them."""
    monkeypatch.setattr(tiles, "TILE", 128)
    monkeypatch.setattr(tiles, "_SMALLEST", 32)
    method = find(name, overrides)
    keywords = method.keywords(options(method, overrides, count(method)))
    with ThreadPoolExecutor(2) as workers:
        outputs = {}
        streamed, resident = leaves(
            tmp_path,
            method,
            dtype,
            method.by_rows(**keywords),
            tiles.Resources(workers, set(), threading.Event()),
            outputs,
        )
        extras = [
            method.prepare(side, [keywords] * len(side)) if method.prepare else [{}] * len(side)
            for side in (streamed, resident)
        ]
        for leaf, resident_leaf, extra, resident_extra in zip(streamed, resident, *extras, strict=True):
            method.merge(leaf, **keywords, **extra)
            expected = np.asarray(method.merge(resident_leaf, **keywords, **resident_extra))
            np.testing.assert_allclose(outputs[leaf.name], expected, rtol=2e-6, atol=2e-6, err_msg=leaf.name)


def test_padding_of_the_last_tile_changes_no_byte(tmp_path, monkeypatch):
    """TIES, whose sums are integers, gives equal bytes for every tile size."""
    method = find("ties")
    keywords = method.keywords(options(method, {}, 3))
    merged = []
    for tile in (64, 256, 1 << 12):
        monkeypatch.setattr(tiles, "TILE", tile)
        folder, outputs = tmp_path / str(tile), {}
        folder.mkdir()
        with ThreadPoolExecutor(2) as workers:
            streamed, _ = leaves(
                folder, method, "float32", False, tiles.Resources(workers, set(), threading.Event()), outputs
            )
            for leaf in streamed:
                method.merge(leaf, **keywords)
        merged.append(outputs)
    for name in NAMES:
        assert merged[0][name].tobytes() == merged[1][name].tobytes() == merged[2][name].tobytes()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("shape", [(3,), (4, 1), (1, 5), (70, 9), (9, 70), (3, 200)])
def test_selection_by_rows_is_exact(tmp_path, monkeypatch, shape):
    """Arcee Fusion selects among complete rows, also where a sample comes first and rows are longer than a tile."""
    monkeypatch.setattr(tiles, "TILE", 64)
    monkeypatch.setattr(tiles, "_BLOCKS", 4)
    monkeypatch.setattr(tiles, "_BLOCK", 16)
    generator, opened, trees = np.random.default_rng(0), [], []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        trees.append(generator.normal(size=shape).astype("float32"))
        tensors.write(folder, {"x": trees[-1]})
        opened.append(lazy.plain(tensors.index(folder)["x"]))
    out, method = np.full(shape, np.nan, "float32"), find("arcee_fusion")

    def sink(start, chunk):
        out.reshape(-1)[start : start + chunk.size] = chunk

    with ThreadPoolExecutor(2) as workers:
        resources = tiles.Resources(workers, set(), threading.Event())
        method.merge(tiles.Tiled("x", opened[0], (opened[1],), (), True, "F32", sink, resources))
    expected = np.asarray(method.merge(Whole("x", trees[0], (trees[1],))))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert (expected == trees[0]).any() or expected.size < 5


@pytest.mark.parametrize("size", [40, 5_000, 60_000])
@pytest.mark.parametrize("levels", [0, 3], ids=["distinct", "ties"])
def test_streamed_selection_is_exact(tmp_path, monkeypatch, size, levels):
    """Exactly the k largest, equal elements by position; with and without a sample, in one leaf and in two."""
    monkeypatch.setattr(tiles, "TILE", 1 << 10)
    generator = np.random.default_rng(size)
    values = generator.normal(size=(2, size)).astype("float32")
    if levels:
        values = np.round(values * levels) / np.float32(levels)
    opened = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        tensors.write(tmp_path / str(number), {"x": values[number]})
        opened.append(lazy.plain(tensors.index(tmp_path / str(number))["x"]))
    with ThreadPoolExecutor(2) as workers:
        make = lambda lazy: tiles.Tiled(
            "x", None, (lazy,), (), False, "F32", lambda *_: None, tiles.Resources(workers, set(), threading.Event())
        )
        for both in (False, True):
            part = [make(lazy) for lazy in (opened if both else opened[:1])]
            flat = np.abs(values if both else values[:1])
            for share in (0, 0.003, 0.5, 0.97, 1):
                count = int(share * flat.size)
                selections = topk.largest(part, topk.magnitudes, [count])
                positions = np.arange(size, dtype=np.uint32)
                mask = np.concatenate(
                    [selection.mask(0, row, positions) for selection, row in zip(selections, flat, strict=True)]
                )
                order = np.lexsort((np.arange(flat.size), -flat.ravel()))[:count]
                assert mask.sum() == count
                assert mask[order].all()
                if 0 < count < flat.size:
                    selections = topk.largest(part, topk.magnitudes, [count], every_tie=True)
                    mask = np.concatenate(
                        [selection.mask(0, row, positions) for selection, row in zip(selections, flat, strict=True)]
                    )
                    np.testing.assert_array_equal(
                        mask, flat.ravel() >= flat.ravel()[order[-1]], "every element equal to the smallest"
                    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_is_found_in_every_type(dtype, value):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = np.array([0, -1, np.finfo("float16").max, 1e-7], "float32").astype(kind)
    assert not tiles.nonfinite(array)
    array[2] = value
    assert tiles.nonfinite(array)


def test_nan_is_named(tmp_path):
    """Also where TIES would trim the element."""
    method, outputs = find("ties"), {}
    with ThreadPoolExecutor(1) as workers:
        streamed, _ = leaves(
            tmp_path, method, "float32", False, tiles.Resources(workers, set(), threading.Event()), outputs
        )
        lazy = streamed[0].models[1]

        def read(start, stop):
            chunk = np.array(lazy.read(start, stop))
            chunk[3] = np.nan
            return chunk

        bad = streamed[0]._replace(models=(streamed[0].models[0], lazy._replace(read=read), *streamed[0].models[2:]))
        with pytest.raises(InputError, match=r"model\.safetensors.*NaN.*'model\.layers\.0\.a\.weight'"):
            method.merge(bad, **method.keywords(options(method, {}, 3)))
