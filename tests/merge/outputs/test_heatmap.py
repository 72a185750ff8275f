"""The heat map and the table of a merge: valid pictures, the names of units and models, and no error without Pillow."""

import sys

import numpy as np
import pytest

from merge.outputs import heatmap


def figures(units, models, seed=0):
    rng = np.random.default_rng(seed)
    shares = rng.random((units, models))
    return shares / shares.sum(1, keepdims=True), rng.random((units, models)) / 50


@pytest.mark.parametrize(("units", "models"), [(1, 1), (6, 4), (48, 3), (9000, 2)])
def test_picture_has_one_row_per_unit(tmp_path, units, models):
    """A PNG whose height follows the number of units, up to a limit."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra `plot`")
    path = tmp_path / "heat.png"
    names, columns = (
        [f"layer {number}" for number in range(units)],
        [f"runs/{number}/model" for number in range(models)],
    )
    shares, changes = figures(units, models)
    changes[0, 0] = np.nan
    assert heatmap.heatmap(path, names, columns, shares, changes)
    with image.open(path) as drawn:
        assert drawn.format == "PNG"
        assert drawn.height == min(heatmap.ROW * units, heatmap.TALLEST) + 100
    assert [path.name for path in tmp_path.iterdir()] == ["heat.png"]


def test_larger_share_is_red(tmp_path):
    """Of two models in one unit, the larger share is red and the smaller share is blue."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra `plot`")
    heatmap.heatmap(tmp_path / "heat.png", ["0"], ["a", "b"], np.array([[0.9, 0.1]]), np.array([[0.02, np.nan]]))
    with image.open(tmp_path / "heat.png") as drawn:
        colours = {colour for _, colour in drawn.getcolors(1 << 16)}
    assert {(103, 0, 31), (5, 48, 97), (253, 231, 37), (224, 224, 224)} <= colours


def test_nothing_is_drawn_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert not heatmap.heatmap(tmp_path / "heat.png", ["a"], ["m"], *figures(1, 1))
    assert not list(tmp_path.iterdir())


def test_any_name_of_a_unit_or_model_is_drawn(tmp_path):
    """Names of several lines, and names that would make a picture of gigabytes."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra `plot`")
    heatmap.heatmap(tmp_path / "heat.png", ["a\nb", "x" * 9000], ["m\n", "\x1b[1m", "y" * 9000], *figures(2, 3))
    with image.open(tmp_path / "heat.png") as drawn:
        assert drawn.width < 2000


def test_table_is_aligned():
    text = heatmap.table(["0", "out"], ["x/a", "x/b"], np.array([[0.25, 0.75], [0.5, 0.5]]), [[0.1, np.nan], [0, 2]])
    assert text.splitlines() == [
        "unit  share a  share b  change a  change b",
        "0      0.2500   0.7500    10.00%         -",
        "out    0.5000   0.5000     0.00%   200.00%",
    ]


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["org/a", "org/b"], ["a", "b"]),
        (["runs/rte/model", "runs/sst2/model"], ["rte/model", "sst2/model"]),
        (["m", "m"], ["m", "m"]),
        (["a/x", "x"], ["a/x", "x"]),
        (["0123456789" * 3], ["...901234567890123456789"]),
    ],
)
def test_model_names_are_short_and_distinct(models, names):
    assert heatmap._short(models) == names
