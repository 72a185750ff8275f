"""Comparisons of two checkpoints: every figure against NumPy over complete arrays, and on tensors with a known answer."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dsee_jax.errors import InputError
from merge import compare
from merge.inputs import sources
from merge.inputs.lazy import Lazy


def source(arrays, sizes=None):
    """A checkpoint in memory; ``sizes`` collects the elements of each read."""

    def lazy(array):
        flat = array.ravel()
        kind = {"bfloat16": "BF16", "float32": "F32", "int64": "I64"}[array.dtype.name]

        def read(start, stop):
            if sizes is not None:
                sizes.append(stop - start)
            return flat[start:stop]

        return Lazy(array.shape, kind, (), array.nbytes, read)

    return sources.Source("x", Path("x"), {}, {name: lazy(array) for name, array in arrays.items()}, {}, {})


@settings(deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(1, 40), tile=st.integers(1, 50), kind=st.sampled_from(["f4", "bf16"]))
def test_rows_do_not_depend_on_tiles(seed, size, tile, kind):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=size).astype(ml_dtypes.bfloat16 if kind == "bf16" else np.float32)
    b = np.where(rng.random(size) < 0.5, a, rng.normal(size=size)).astype(np.float32)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "TILE", tile)
        (row,) = compare.compare(source({"w": a}, sizes), source({"w": b})).rows
    assert max(sizes) <= tile
    x, y = a.astype(np.float64), b.astype(np.float64)
    norm = np.linalg.norm
    assert (row.unit, row.size) == ("w", size)
    assert row.change == pytest.approx(norm(y - x) / norm(x))
    assert row.largest == pytest.approx(np.max(np.abs(y - x)))
    assert row.cosine == pytest.approx(x @ y / (norm(x) * norm(y)))
    assert row.equal == pytest.approx(np.mean(x == y))


def test_figures_of_known_changes():
    """Doubled, negated, equal, zero before, zero in both; integers are compared by value."""
    before = {name: np.array([3.0, 4.0], np.float32) for name in ("doubled", "negated", "equal")}
    before |= {"from zero": np.zeros(2, np.float32), "zeros": np.zeros(2, np.float32), "integers": np.array([1, 2**40])}
    after = before | {"doubled": 2 * before["doubled"], "negated": -before["negated"], "from zero": before["equal"]}
    rows = {row.unit: row[1:] for row in compare.compare(source(before), source(after)).rows}
    undefined = float("nan")
    assert rows["doubled"] == pytest.approx((2, 1, 4, 1, 0))
    assert rows["negated"] == pytest.approx((2, 2, 8, -1, 0))
    assert rows["equal"] == pytest.approx((2, 0, 0, 1, 1))
    assert rows["from zero"] == pytest.approx((2, np.inf, 4, undefined, 0), nan_ok=True)
    assert rows["zeros"] == pytest.approx((2, 0, 0, undefined, 1), nan_ok=True)
    assert rows["integers"] == pytest.approx((2, 0, 0, 1, 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nonfinite_value_shows_in_the_row(bad):
    """At any position, and without a warning."""
    for place in (0, 1):
        a = np.ones(2, np.float32)
        b = a.copy()
        b[place] = bad
        (row,) = compare.compare(source({"w": a}), source({"w": b})).rows
        assert not np.isfinite(row.change)
        assert not np.isfinite(row.largest)
        assert row.equal == 0.5


def test_row_of_a_layer_has_all_its_tensors():
    """A layer equals the concatenation of its tensors; tensors outside the layers are in the last row."""
    rng = np.random.default_rng(0)
    names = (
        "model.embed.weight",
        "model.layers.0.a.weight",
        "model.layers.10.a.weight",
        "model.layers.0.b.weight",
        "model.layers.9.w",
    )
    a, b = ({name: rng.normal(size=6).astype(np.float32) for name in names} for _ in "ab")
    comparison = compare.compare(source(a), source(b), unit="layer")
    assert [row.unit for row in comparison.rows] == ["0", "9", "10", "other"]
    joined = (np.concatenate([side[names[1]], side[names[3]]]) for side in (a, b))
    (alone,) = compare.compare(*(source({"0": x}) for x in joined)).rows
    assert comparison.rows[0] == pytest.approx(alone)
    assert comparison.total.size == 30


def test_unmatched_tensors_are_listed():
    one, two = np.ones(3, np.float32), np.ones((3, 2), np.float32)
    comparison = compare.compare(source({"w": one, "x": one, "y": one}), source({"w": one, "x": two, "z": one}))
    assert [row.unit for row in comparison.rows] == ["w"]
    assert (comparison.only_a, comparison.only_b, comparison.reshaped) == (["y"], ["z"], [("x", (3,), (3, 2))])
    text = compare.table(comparison)
    for line in ("only in A (1): y", "only in B (1): z", "shapes differ (1): x (3,) and (3, 2)"):
        assert line in text
    with pytest.raises(InputError, match="no tensor of one name and shape"):
        compare.compare(source({"a": one}), source({"b": one}))


def test_table_of_two_folders_is_aligned(tmp_path):
    """Two models that differ in the seed."""
    a, b = (sources.open_source(str(tiny.bert(tmp_path / n, seed=n == "b")), tmp_path) for n in "ab")
    same, other = compare.compare(a, a), compare.compare(a, b, unit="layer")
    assert (same.total.change, same.total.equal) == (0, 1)
    assert 0.9 < other.total.change < 1.6
    lines = compare.table(other).splitlines()
    assert [line.split()[0] for line in lines] == ["unit", "0", "1", "other", "all"]
    assert len({len(line) for line in lines}) == 1


def test_bare_model_matches_a_model_with_a_prefix(tmp_path):
    """The files of a bare model lack the prefix and the head."""
    bare = tiny.bert(tmp_path / "bare", prefix=False, head=False)
    a, b = (sources.open_source(str(folder), tmp_path) for folder in (bare, tiny.bert(tmp_path / "full")))
    for one, two in ((a, b), (b, a)):
        comparison = compare.compare(one, two)
        assert (len(comparison.rows), comparison.total.equal) == (len(a.tensors), 1)
        assert {*comparison.only_a, *comparison.only_b} == {
            f"{name}.{kind}" for name in ("bert.pooler.dense", "classifier") for kind in ("bias", "weight")
        }


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.00%"), (1e-9, ">0%"), (0.5, "50.00%"), (1 - 1e-9, "<100%"), (1, "100.00%")]
)
def test_share_near_one_is_not_rounded_to_one(share, text):
    row = compare.Row("w", 1, 0.0, 0.0, 1.0, share)
    assert compare.table(compare.Comparison([row], row, [], [], [])).splitlines()[1].endswith(f"  {text}")
