"""The page of runs: escaped and complete markup, no requests, and the figures it computes."""

import html.parser
import re
import shutil

import numpy as np
import pytest

import runs
from dsee_jax.__main__ import main
from dsee_jax.analysis import page, pictures
from dsee_jax.analysis.compare import effective_rank
from dsee_jax.analysis.page import charts, markup, run_files, sections
from dsee_jax.analysis.page.charts import Line
from dsee_jax.analysis.page.run_files import RunFigures, Update
from dsee_jax.analysis.pictures import curves
from dsee_jax.analysis.pictures.sparsity import Zeros

RANDOM = np.random.default_rng(0)
HOSTILE = "\"'><script>alert(1)</script><img src=https://a.b/c onerror=x>\x1b\u202e"
VOID = {"meta"}


class Parser(html.parser.HTMLParser):
    """Collects the elements and attributes of a page, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes = [], set(), {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= dict(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def figures(
    name: str = "run", *, metric: str = "accuracy", kernel: str = "attention/query", tune: int = 12
) -> RunFigures:
    """A run with something to show in every section."""
    log = [
        {"stage": "before", "step": 0, "metrics": {metric: 0.5}},
        {"stage": "tune", "step": 10, "loss": 0.6, "learning_rate": 1e-3},
        {"stage": "tune", "step": tune, "loss": 0.5, "learning_rate": 0.0},
        {"stage": "tune", "step": tune, "metrics": {metric: 0.7}},
        {"stage": "prune", "step": 0, "metrics": {metric: None}},
    ]
    results = {
        "task": name,
        "seed": 0,
        "before": {metric: 0.5},
        "stages": [
            {"name": "tune", "metrics": {metric: 0.7}, "steps": tune, "evaluations": 1},
            {"name": name, "metrics": {}},
        ],
        "final": {metric: 0.7},
        **runs.COSTS,
    }
    support = RANDOM.integers(0, 30, (20, 2))
    return RunFigures(
        *(name, results, *curves.timeline(log)),
        Zeros([kernel], np.array([[8.0, np.nan]]), np.array([[10.0, np.nan]])),
        {"heads": {"layer_0": np.array([True, False])}, "neurons": {"layer_0": RANDOM.random(100) > 0.5}},
        {kernel: {"0": Update(3.5, (30, 40), support), "1": Update(2.5, (30, 40), support)}},
    )


def test_names_on_a_page_are_text():
    """Names of runs, tasks, stages, metrics and kernels are escaped everywhere, in attributes too."""
    text = page.render([figures(HOSTILE, metric=HOSTILE, kernel=HOSTILE), figures("other", metric="f1")])
    parsed = Parser(text)
    assert not {"script", "img"} & parsed.tags
    assert not [name for name in parsed.attributes if name.startswith("on") or name in ("src", "href")]
    assert not {"\x1b", "\u202e"} & set(text)


def test_page_loads_nothing():
    text = page.render([figures()])
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert not re.search(r"url\(|@import|<link|<script|https?://", text)


def test_every_section_shows_every_run():
    runs = [figures("one", kernel="query"), figures("two", kernel="value")]
    for section in sections.SECTIONS:
        shown = section(runs)
        assert all(run.name in shown or charts.run_class(number) in shown for number, run in enumerate(runs)), section


def test_runs_of_other_stages_have_no_marks_of_stages():
    assert 'class="stage"' in sections.curves([figures(), figures("other")])
    assert 'class="stage"' not in sections.curves([figures(), figures("other", tune=14)])


def test_section_without_data_is_empty():
    bare = figures()._replace(zeros=None, kept={}, updates={}, placed=[], begin={})
    text = page.render([bare])
    assert re.findall("<h2>(.*?)</h2>", text) == ["Stages", "Costs"]


@pytest.mark.parametrize(
    "points",
    [
        [(0, 1.0)],
        [(0, 2.0), (5, 2.0)],
        [(0, None), (1, float("nan")), (2, 1e-9), (3, 1e9)],
        [(x, x % 7) for x in range(999)],
    ],
    ids=["one point", "constant", "gaps", "many"],
)
def test_line_stays_inside_its_chart(points):
    drawn = charts.lines("x", [Line("run", points, 0)], x_label="step", marks={"tune": 0})
    Parser(drawn)
    places = [tuple(map(float, pair)) for pair in re.findall(r'cx="([^"]+)" cy="([^"]+)"', drawn)]
    assert 0 < len(places) <= charts.POINTS
    assert all(0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT for x, y in places)


def test_text_of_a_tag_is_escaped_once():
    assert markup.tag("p", "a < b", class_='"') == '<p class="&quot;">a &lt; b</p>'
    assert markup.tag("p", markup.tag("b", "&")) == "<p><b>&amp;</b></p>"


@pytest.mark.parametrize(("rank", "nonzeros"), [(2, 7), (3, 0), (0, 7)])
def test_singular_values_are_those_of_the_sum(rank, nonzeros):
    """Some entries share a row, and one its place."""
    low = (RANDOM.normal(size=(9, rank)), RANDOM.normal(size=(rank, 6))) if rank else None
    support = np.stack([RANDOM.integers(0, limit, nonzeros) for limit in (9, 6)], 1)
    values, dense = RANDOM.normal(size=nonzeros), np.zeros((9, 6))
    support[1:2] = support[:1]
    np.add.at(dense, (support[:, 0], support[:, 1]), values)
    dense += low[0] @ low[1] if low else 0
    found = np.zeros(6)
    computed = run_files.singular_values(low, values, support)[:6]
    found[: len(computed)] = computed
    np.testing.assert_allclose(found, np.linalg.svd(dense, compute_uv=False), atol=1e-12)
    assert run_files.entropy_rank(computed) == pytest.approx(effective_rank(dense))


def test_report_of_two_runs_writes_one_page(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda run, say, **options: {})
    for name in ("a", "b"):
        shutil.copytree(finished_run("dsee") / "run", tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert f"page     {tmp_path / 'a' / 'report.html'}" in capsys.readouterr().out
    text = (tmp_path / "a" / "report.html").read_text()
    Parser(text)
    assert re.findall("<h2>(.*?)</h2>", text) == [
        *("Stages", "Costs", "Curves", "Zeros", "Effective rank of the updates", "Where the sparse updates lie"),
    ]
    assert not (tmp_path / "b" / "report.html").exists()


def test_page_of_a_damaged_log_is_not_written(finished_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda run, say, **options: {})
    run = tmp_path / "run"
    shutil.copytree(finished_run("dsee") / "run", run, ignore=shutil.ignore_patterns("checkpoints"))
    (run / "metrics.jsonl").write_text('{"stage": "tune", "loss": 1}\n')
    assert main(["report", str(run)]) == 0
    assert "page not written: a run is damaged (KeyError: 'step')" in capsys.readouterr().out
    assert not (run / "report.html").exists()
    assert main(["report", str(run), f"--html={tmp_path / 'page.html'}"]) == 2
    assert "page not written: a run is damaged (KeyError: 'step')" in capsys.readouterr().err


def test_store_that_is_for_reading_gets_no_page(capsys):
    assert main(["report", "hf://me/run"]) == 2
    assert "hf://me/run cannot be written" in capsys.readouterr().err


def test_run_that_is_not_finished_is_named_before_anything_is_shown(finished_run, tmp_path, capsys):
    assert main(["report", str(finished_run("dsee") / "run"), str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{tmp_path} is no finished run" in said.err
