"""The harness that measures this library and its peers in turns: pairs, checks, resuming and tables, with invented sides."""

import json
import sys
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.peers import __main__ as command
from benchmarks.peers import child, environments, questions, results, rounds, shapes
from benchmarks.peers.questions import Peer, Question

MACHINE = {"cpu": "a processor", "cores": 2, "threads": 2, "system": "linux"}
QUESTION = Question(
    "A question",
    "Seconds of a call.",
    {"ours": Peer("us", "ours"), "peer": Peer("them", "theirs"), "cut": Peer("cut", "ours")},
    {"a case": {"shape": "tiny-bert", "batch": 2, "length": 16}},
    {},
    ratios=(("ours", "peer"), ("cut", "ours")),
)


def answers(**seconds: list[float]) -> dict[str, Any]:
    """Return the answers of `rounds.measure` for sides with these seconds."""
    return {
        name: {"facts": {}, "check": {}, "rounds": [{"seconds": each} for each in values]}
        for name, values in seconds.items()
    }


def test_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    """A machine that slows down in the second round slows both sides of it."""
    found = results.ratio([1.0, 4.0, 2.0], [2.0, 8.0, 1.0])
    assert found == {"median": 0.5, "least": 0.5, "most": 2.0, "pairs": [0.5, 0.5, 2.0]}


def test_rounds_turn_their_order_so_that_a_drift_favours_no_side():
    assert [rounds.order("abc", number) for number in range(3)] == [list("abc"), list("cba"), list("abc")]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"loss": 0.70001, "logits": [[1.0, 2.0], [3.0, 400.02]]}, ""),
        ({"another name": 3.0}, ""),
        ({"loss": 0.7002}, "loss: differs by 0.0002, more than 0.0001"),
        ({"logits": [[1.0, 2.0], [3.0, 400.1]]}, "logits: differs by 0.1, more than 0.04"),
        ({"logits": [[1.0, 2.0]]}, "logits: 4 numbers and 2"),
        ({"loss": float("nan")}, "loss: differs by nan, more than 0.0001"),
    ],
)
def test_sides_that_compute_other_numbers_are_found(other, difference):
    """The tolerance is 1e-4 of the largest number, and at least of 1."""
    assert rounds.check({"loss": 0.7, "logits": [[1.0, 2.0], [3.0, 400.0]]}, other, 1e-4) == difference


def test_a_record_has_the_ratios_of_the_question_and_leaves_out_failed_sides():
    sides = answers(ours=[1.0, 1.0, 4.0], peer=[2.0, 4.0, 4.0], cut=[0.5, 0.5, 2.0])
    record = results.record(QUESTION, QUESTION.cases["a case"], sides, pairs=3, machine=MACHINE)
    assert {key: found["seconds"]["median"] for key, found in record["ratios"].items()} == {
        "ours/peer": 0.5,
        "cut/ours": 0.5,
    }
    assert record["sides"]["peer"]["medians"] == {"seconds": 4.0}
    failed = results.record(QUESTION, {}, sides | {"peer": {"error": "killed"}}, pairs=3, machine=MACHINE)
    assert list(failed["ratios"]) == ["cut/ours"]
    assert failed["sides"]["peer"] == {"error": "killed"}


def test_mfu_counts_forward_and_backward_over_the_fastest_product_of_any_side():
    """A step of frozen kernels has twice the FLOPs of its forward pass."""
    sides = answers(ours=[1.0], peer=[2.0])
    for side, rate in (("ours", 1e9), ("peer", 2e9)):
        sides[side]["rounds"][0]["matmul_flops_per_second"] = rate
    record = results.record(QUESTION._replace(training=True), QUESTION.cases["a case"], sides, pairs=1, machine=MACHINE)
    expected = 2 * shapes.flops("tiny-bert", 2, 16) / 2e9
    assert record["sides"]["ours"]["mfu"] == pytest.approx(expected)
    assert record["sides"]["peer"]["mfu"] == pytest.approx(expected / 2)


def test_flops_of_bert_base_are_those_of_its_matrices():
    """Two per weight of a layer and token, and twice two per token and number of a head's scores and sums."""
    per_layer = 4 * 768 * 768 + 2 * 768 * 3072 + 2 * 128 * 768
    assert shapes.flops("bert-base", 8, 128) == 2 * 8 * 128 * 12 * per_layer


def test_a_stored_case_is_measured_again_only_if_something_changed():
    case = QUESTION.cases["a case"]
    sides = answers(ours=[1.0] * 5, peer=[1.0] * 5, cut=[1.0] * 5)
    stored = results.record(QUESTION, case, sides, pairs=5, machine=MACHINE)

    def done(record=stored, case=case, sides=("ours", "peer", "cut"), pairs=5, machine=MACHINE):
        return results.is_done(record, case, sides, pairs=pairs, machine=machine)

    assert done()
    assert done(pairs=3)
    assert not done(record=None)
    assert not done(pairs=6)
    assert not done(case=case | {"batch": 4})
    assert not done(machine=MACHINE | {"threads": 1})
    assert not done(sides=("ours", "peer", "cut", "another"))
    assert not done(record=stored | {"sides": stored["sides"] | {"peer": {"error": "killed"}}})


def test_the_table_has_a_row_for_each_case_and_a_column_for_each_ratio(tmp_path):
    sides = answers(ours=[1.0, 1.0, 4.0], peer=[2.0, 4.0, 4.0], cut=[0.05, 0.05, 0.2])
    record = results.record(QUESTION, QUESTION.cases["a case"], sides, pairs=3, machine=MACHINE)
    results.write(tmp_path / "name.json", QUESTION, {"a case": record, "an older case": record})
    text = results.tables({"absent": QUESTION, "name": QUESTION}, tmp_path)
    assert text.splitlines()[:5] == [
        "**A question** (a processor, 2 cores)",
        "",
        "| case | us | them | cut / us |",
        "|---|---|---|---|",
        "| a case | 1.00 s | **0.50** (0.25 to 1.00), 4.00 s | **0.05** (0.05 to 0.05), 50 ms |",
    ]
    assert "an older case" not in text
    # A figure that only one side has.
    record["sides"]["ours"]["medians"]["peak_bytes"] = 2e9
    assert "| a case: memory | 2.00 GB |  |  |" in results.table(
        QUESTION._replace(metrics=("peak_bytes",)), {"a case": record}
    )
    assert "median of 3 pairs or more" in text


def test_every_question_names_modules_environments_and_shapes_that_exist():
    for question in (questions.QUESTIONS | questions.GPU).values():
        for side in question.sides.values():
            assert (rounds.ROOT / "benchmarks" / "peers" / f"{side.module}.py").exists(), side
            assert not side.environment or side.environment in environments.ENVIRONMENTS, side
        for case in (*question.cases.values(), *question.small.values()):
            assert {case.get("shape", "bert-base"), case.get("checkpoints", "bert-base")} <= shapes.SHAPES.keys(), case
        assert {each for pair in question.pairs() for each in pair} <= question.sides.keys()


def test_a_round_has_as_many_calls_as_its_seconds_allow_and_the_seconds_are_of_one(monkeypatch):
    """Calls of 0.25 s in a round of 1 s; the result of the last one is waited for."""
    clock, finished = [0.0], []

    def call():
        clock[0] += 0.25
        return clock[0]

    monkeypatch.setattr(child.time, "perf_counter", lambda: clock[0])
    measure = child.repeated(call, {"round": 1.0, "warmup": 3}, finish=finished.append)
    assert clock == [0.75]
    assert measure(0) == {"seconds": 0.25, "calls": 4}
    assert finished == [0.25, 0.5, 0.75, 1.75]


SIDE = """
import os, sys
from benchmarks.peers import child

def prepare(case):
    print("a library prints on stdout")
    if case["number"] < 0:
        sys.exit("no such number")
    return child.Side(lambda round: {"seconds": case["number"] + round}, {"cores": len(os.sched_getaffinity(0))},
                      {"number": case["checked"]})

child.serve(prepare)
"""


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Return a function that gives the launch of an invented side, whose process imports no library."""
    monkeypatch.setattr(rounds, "PACKAGE", "sides")
    (tmp_path / "sides").mkdir()
    (tmp_path / "sides" / "invented.py").write_text(SIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda number, checked=1.0: rounds.Launch(sys.executable, "invented", {"number": number, "checked": checked})


def test_sides_answer_in_turns_and_failed_ones_are_named(launch):
    """One side lives through all rounds; one fails at its start; one computes another number."""
    launches = {"ours": launch(1), "broken": launch(-1), "other": launch(2, checked=1.5)}
    found = rounds.measure(launches, pairs=2, cores=machine.cores()[:1], fresh=False, tolerance=1e-4)
    assert found["ours"]["rounds"] == [{"seconds": 1}, {"seconds": 2}]
    assert found["ours"]["facts"] == {"cores": 1}
    assert found["broken"]["error"].splitlines()[0] == "exit status 1"
    assert "no such number" in found["broken"]["error"]
    assert found["other"]["error"] == "computes other numbers than ours: number: differs by 0.5, more than 0.0001"


def test_fresh_sides_are_new_processes(launch):
    found = rounds.measure({"ours": launch(1)}, pairs=2, cores=machine.cores()[:1], fresh=True, tolerance=1e-4)
    assert found["ours"]["rounds"] == [{"seconds": 1}, {"seconds": 1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no question 'nothing'; expected some of train_step, "),
        (["grebsmo", "--sides", "cut", "nobody"], "--sides: no side 'nobody'; expected some of "),
        (["grebsmo", "--pairs", "0"], "--pairs is 0; expected 1 or more"),
        (["grebsmo", "--threads", "10000"], "--threads is 10000; expected 1 to "),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


def test_a_case_without_its_data_is_left_out_with_the_option_that_gives_it(tmp_path):
    options = command.parser().parse_args(["--work", str(tmp_path), "--model", str(tmp_path)])
    (tmp_path / "model.safetensors").touch()
    case = questions.QUESTIONS["epoch"].cases["MiniLM, RTE"]
    assert command.prepared(case, options) == "no data: pass --data GLUE_DIR with RTE/train.tsv"


def test_the_list_names_every_question_and_case():
    text = command.listing(questions.QUESTIONS)
    assert all(name in text and all(case in text for case in each.cases) for name, each in questions.QUESTIONS.items())


@pytest.mark.slow
def test_a_question_is_measured_from_the_command_and_is_stored(tmp_path, monkeypatch, capsys):
    """The import of packages: processes that start fast."""
    monkeypatch.setattr(sys, "argv", ["peers", "import", "--small", "--pairs", "1", "--sides", "--work", str(tmp_path)])
    for said in ("import, import\n", "import, import: stored\n"):
        assert command.main() == 0
        assert said in capsys.readouterr().out
    stored = json.loads((tmp_path / "small" / "import.json").read_text())["cases"]["import"]
    assert 0 < stored["sides"]["ours"]["medians"]["seconds"] < 60
