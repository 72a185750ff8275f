"""Two checkpoints compared: every figure next to NumPy over whole arrays, and on tensors whose answer is known."""

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


def source(arrays, asked=None):
    """A checkpoint in memory; ``asked`` collects how many elements each read takes."""

    def lazy(array):
        flat = array.ravel()
        kind = {"bfloat16": "BF16", "float32": "F32", "int64": "I64"}[array.dtype.name]

        def read(start, stop):
            if asked is not None:
                asked.append(stop - start)
            return flat[start:stop]

        return Lazy(array.shape, kind, (), array.nbytes, read)

    return sources.Source("x", Path("x"), {}, {name: lazy(array) for name, array in arrays.items()}, {}, {})


@settings(deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(1, 40), tile=st.integers(1, 50), kind=st.sampled_from(["f4", "bf16"]))
def test_rows_are_numpys_whatever_the_tiles(seed, size, tile, kind):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=size).astype(ml_dtypes.bfloat16 if kind == "bf16" else np.float32)
    b = np.where(rng.random(size) < 0.5, a, rng.normal(size=size)).astype(np.float32)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "TILE", tile)
        (row,) = compare.compare(source({"w": a}, asked), source({"w": b})).rows
    assert max(asked) <= tile
    x, y = a.astype(np.float64), b.astype(np.float64)
    norm = np.linalg.norm
    assert (row.unit, row.size) == ("w", size)
    assert row.change == pytest.approx(norm(y - x) / norm(x))
    assert row.largest == pytest.approx(np.max(np.abs(y - x)))
    assert row.cosine == pytest.approx(x @ y / (norm(x) * norm(y)))
    assert row.equal == pytest.approx(np.mean(x == y))


def test_known_tensors():
    """Doubled, turned round, equal, zero before, zero in both; integers by value."""
    before = {name: np.array([3.0, 4.0], np.float32) for name in ("doubled", "turned", "equal")}
    before |= {"from zero": np.zeros(2, np.float32), "zeros": np.zeros(2, np.float32), "whole": np.array([1, 2**40])}
    after = before | {"doubled": 2 * before["doubled"], "turned": -before["turned"], "from zero": before["equal"]}
    rows = {row.unit: row[1:] for row in compare.compare(source(before), source(after)).rows}
    nothing = float("nan")
    assert rows["doubled"] == pytest.approx((2, 1, 4, 1, 0))
    assert rows["turned"] == pytest.approx((2, 2, 8, -1, 0))
    assert rows["equal"] == pytest.approx((2, 0, 0, 1, 1))
    assert rows["from zero"] == pytest.approx((2, np.inf, 4, nothing, 0), nan_ok=True)
    assert rows["zeros"] == pytest.approx((2, 0, 0, nothing, 1), nan_ok=True)
    assert rows["whole"] == pytest.approx((2, 0, 0, 1, 1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_shows(bad):
    """It is never skipped, wherever it stands, and nothing warns."""
    for place in (0, 1):
        a = np.ones(2, np.float32)
        b = a.copy()
        b[place] = bad
        (row,) = compare.compare(source({"w": a}), source({"w": b})).rows
        assert not np.isfinite(row.change)
        assert not np.isfinite(row.largest)
        assert row.equal == 0.5


def test_units_add_up():
    """By layer: the tensors of one are as one long tensor; those outside come last."""
    rng = np.random.default_rng(0)
    names = (
        "model.embed.weight",
        "model.layers.0.a.weight",
        "model.layers.10.a.weight",
        "model.layers.0.b.weight",
        "model.layers.9.w",
    )
    a, b = ({name: rng.normal(size=6).astype(np.float32) for name in names} for _ in "ab")
    found = compare.compare(source(a), source(b), unit="layer")
    assert [row.unit for row in found.rows] == ["0", "9", "10", "other"]
    joined = (np.concatenate([side[names[1]], side[names[3]]]) for side in (a, b))
    (alone,) = compare.compare(*(source({"0": x}) for x in joined)).rows
    assert found.rows[0] == pytest.approx(alone)
    assert found.total.size == 30


def test_what_stands_on_one_side():
    one, two = np.ones(3, np.float32), np.ones((3, 2), np.float32)
    found = compare.compare(source({"w": one, "x": one, "y": one}), source({"w": one, "x": two, "z": one}))
    assert [row.unit for row in found.rows] == ["w"]
    assert (found.only_a, found.only_b, found.reshaped) == (["y"], ["z"], [("x", (3,), (3, 2))])
    said = compare.table(found)
    for text in ("only in A (1): y", "only in B (1): z", "shapes differ (1): x (3,) and (3, 2)"):
        assert text in said
    with pytest.raises(InputError, match="no tensor of one name and shape"):
        compare.compare(source({"a": one}), source({"b": one}))


def test_two_folders(tmp_path):
    """Of real files: equal but for one seed, and the table says it in aligned columns."""
    a, b = (sources.open_source(str(tiny.bert(tmp_path / n, seed=n == "b")), tmp_path) for n in "ab")
    same, other = compare.compare(a, a), compare.compare(a, b, unit="layer")
    assert (same.total.change, same.total.equal) == (0, 1)
    assert 0.9 < other.total.change < 1.6
    lines = compare.table(other).splitlines()
    assert [line.split()[0] for line in lines] == ["unit", "0", "1", "other", "all"]
    assert len({len(line) for line in lines}) == 1


def test_a_bare_model_pairs_with_one_that_has_a_prefix(tmp_path):
    """Its files lack the prefix; heads stand on one side."""
    bare = tiny.bert(tmp_path / "bare", prefix=False, head=False)
    a, b = (sources.open_source(str(folder), tmp_path) for folder in (bare, tiny.bert(tmp_path / "full")))
    for one, two in ((a, b), (b, a)):
        found = compare.compare(one, two)
        assert (len(found.rows), found.total.equal) == (len(a.tensors), 1)
        assert {*found.only_a, *found.only_b} == {
            f"{name}.{kind}" for name in ("bert.pooler.dense", "classifier") for kind in ("bias", "weight")
        }


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.00%"), (1e-9, ">0%"), (0.5, "50.00%"), (1 - 1e-9, "<100%"), (1, "100.00%")]
)
def test_nearly_all_is_not_all(share, text):
    row = compare.Row("w", 1, 0.0, 0.0, 1.0, share)
    assert compare.table(compare.Comparison([row], row, [], [], [])).splitlines()[1].endswith(f"  {text}")
