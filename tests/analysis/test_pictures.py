"""Pictures: their content, no picture without data, and one line without matplotlib."""

import json
import sys

import numpy as np
import pytest

import tiny
from dsee_jax.analysis import pictures
from dsee_jax.analysis.pictures import curves, kept, search, sparsity
from dsee_jax.ckpt import kept_units
from dsee_jax.prune import earlybert

RANDOM = np.random.default_rng(0)
LOG = [
    {"stage": "before", "step": 0, "metrics": {"accuracy": 0.5, "loss": 0.7}},
    {"stage": "tune", "step": 10, "loss": 0.6, "learning_rate": 1e-3},
    {"stage": "tune", "step": 12, "loss": 0.5, "learning_rate": 1e-4},
    {"stage": "tune", "step": 12, "metrics": {"accuracy": 0.7, "loss": 0.5}},
    {"stage": "prune", "step": 0, "metrics": {"accuracy": 0.6, "loss": 0.6}},
    {"stage": "retune", "step": 10, "loss": 0.4, "learning_rate": 1e-3},
    {"stage": "retune", "step": 10, "metrics": {"accuracy": 0.8, "loss": 0.4}},
]


@pytest.fixture(autouse=True)
def matplotlib():
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")


def checks(layers=3, heads=4, neurons=16, count=5):
    """The records of a search with diverging coefficients, and the record of the drawn ticket."""
    c = {
        kind: {f"layer_{layer}": np.ones(units) for layer in range(layers)}
        for kind, units in (("heads", heads), ("neurons", neurons))
    }
    records, before = [], None
    for check in range(1, count + 1):
        c = {kind: {name: x - RANDOM.random(x.shape) / 10 for name, x in of.items()} for kind, of in c.items()}
        ticket = earlybert.draw(c, heads=1, neurons=0.5)
        moved = earlybert.distance(before, ticket) if before else {}
        about = {"coefficients": earlybert.summary(c), "kept": earlybert.packed(ticket), "distance": moved}
        records.append({"stage": "search", "step": 2 * check} | about)
        before = ticket
    return [*records, {"stage": "draw", "step": 0, "metrics": {"accuracy": 0.5}}]


def drawn(figure, tmp_path):
    figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_stage_without_training_is_at_the_end_of_the_stage_before():
    placed, begin = curves.timeline(LOG)
    assert [at for at, _ in placed] == [0, 10, 12, 12, 12, 22, 22]
    assert begin == {"before": 0, "tune": 0, "prune": 12, "retune": 12}


def test_curves_of_a_run(tmp_path):
    figure = curves.draw(LOG)
    assert [axis.get_ylabel() for axis in figure.axes] == ["training loss", "learning rate", "dev score"]
    (accuracy,) = [line for line in figure.axes[2].lines if line.get_label() == "accuracy"]
    np.testing.assert_allclose(accuracy.get_xydata(), [(0, 0.5), (12, 0.7), (12, 0.6), (22, 0.8)])
    assert [text.get_text() for text in figure.axes[0].texts] == ["before, tune", "prune, retune"]
    drawn(figure, tmp_path)


@pytest.mark.parametrize("layers", [1, 6, 24])
def test_kept_units_of_every_layer(tmp_path, layers):
    heads = {f"layer_{layer}": RANDOM.random(12) < 0.5 for layer in range(layers)}
    neurons = {f"layer_{layer}": RANDOM.random(300) < 0.5 for layer in range(layers)}
    figure = kept.draw({"heads": heads, "neurons": neurons})
    left, bars, blocks = figure.axes[:3]
    count = sum(flags.sum() for flags in heads.values())
    assert left.get_title() == f"{count} of {12 * layers} heads kept (blue)"
    np.testing.assert_array_equal(left.images[0].get_array()[layers - 1], heads[f"layer_{layers - 1}"])
    widths = [bar.get_width() for bar in bars.patches]
    np.testing.assert_allclose(widths, [100 * flags.mean() for flags in neurons.values()])
    assert blocks.images[0].get_array().shape == (layers, 128)
    drawn(figure, tmp_path)


def test_dropped_layer_keeps_no_units():
    tables = kept.by_layer({"layers": np.array([True, False]), "heads": {"layer_0": np.array([True, False])}})
    assert {kind: [flags.tolist() for flags in layers.values()] for kind, layers in tables.items()} == {
        "layers": [[True], [False]],
        "heads": [[True, False], [False, False]],
    }
    assert kept.draw({"hidden": np.array([True, False])}) is None


def test_absent_layer_is_drawn_as_kept():
    figure = kept.draw({"heads": {"layer_0": np.array([True, False])}, "neurons": {"layer_1": np.zeros(3, bool)}})
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), [[1, 0], [1, 1]])
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), [[1, 1, 1], [0, 0, 0]])


def test_zeros_of_every_kernel(tmp_path):
    """By Hugging Face's names, layers in columns; biases, norms and tensors outside the layers do not count."""
    fields = tiny.config()
    weights = tiny.weights(fields)
    weights["bert.encoder.layer.1.output.dense.weight"][:, :10] = 0
    weights["bert.pooler.dense.weight"][:] = 0
    counts = sparsity.zeros(tiny.write(tmp_path / "model", fields, weights))
    assert len(counts.kernels) == 6
    assert counts.zeros.sum() == counts.zeros[counts.kernels.index("output.dense"), 1] == 24 * 10
    figure = sparsity.draw(counts)
    assert figure.axes[0].get_title() == f"weights that are zero: {240 / counts.entries.sum():.1%} of these kernels"
    assert "25" in [text.get_text() for text in figure.axes[0].texts]
    drawn(figure, tmp_path)
    assert sparsity.draw(counts._replace(zeros=0 * counts.zeros)) is None


@pytest.mark.parametrize("layers", [3, 24])
def test_coefficients_and_mask_changes_of_a_search(tmp_path, layers):
    records = checks(layers)
    figure = search.draw(records)
    heads, neurons, moves, *_ = figure.axes
    rows = heads.collections[0].get_array()
    assert rows.shape == (4 * layers, 5)
    np.testing.assert_allclose(rows[5], [check["coefficients"]["heads"]["layer_1"][1] for check in records[:-1]])
    assert len(neurons.lines) == 5 * layers + 1
    lines = {line.get_label(): line.get_ydata() for line in moves.lines}
    np.testing.assert_allclose(
        lines["heads: from the previous check"], [100 * check["distance"]["heads"] for check in records[1:-1]]
    )
    # Between the last two checks both distances are equal.
    for kind in ("heads", "neurons"):
        assert lines[f"{kind}: from the last check"][-1] == 0
        assert lines[f"{kind}: from the last check"][-2] == pytest.approx(lines[f"{kind}: from the previous check"][-1])
    (at,) = {*moves.lines[-1].get_xdata()}
    assert (at, moves.lines[-1].get_label()) == (10, "ticket drawn")
    drawn(figure, tmp_path)


def test_undrawn_ticket_is_not_marked():
    assert "ticket drawn" not in [line.get_label() for line in search.draw(checks()[:-1]).axes[2].lines]


def test_distance_of_masks_in_hexadecimal():
    a, b = ({"layer_0": RANDOM.random(5) < 0.5, "layer_1": RANDOM.random(12) < 0.5} for _ in range(2))
    packed = [earlybert.packed({"heads": each})["heads"] for each in (a, b)]
    assert search.distance(*packed) / 17 == pytest.approx(earlybert.distance({"heads": a}, {"heads": b})["heads"])


def test_no_data_gives_no_picture(tmp_path):
    assert curves.draw([]) is kept.draw({}) is search.draw(LOG) is None


def run(tmp_path):
    folder = tmp_path / "run"
    tiny.bert(folder / "model")
    kept_units.write(folder / "model", {"heads": {"layer_0": np.array([True, False, True])}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*LOG[:2], *checks(2)]))
    return folder


def test_pictures_are_written_to_the_run(tmp_path):
    lines = []
    folder = run(tmp_path)
    drawn = pictures.draw(folder, lines.append)
    assert {path.name for path in folder.glob("*.png")} == {"curves.png", "kept.png", "search.png"}
    assert drawn == {name: folder / f"{name}.png" for name in ("curves", "kept", "search")}
    assert not lines


def test_missing_matplotlib_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    lines = []
    assert not pictures.draw(run(tmp_path), lines.append)
    assert lines == ["pictures not drawn: pip install 'dsee-jax[plot]'"]
    assert not [*tmp_path.rglob("*.png")]
