"""The harness that measures this library and its peers in turns: pairs, checks, resuming and tables, with invented sides."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import machine
from benchmarks.peers import __main__ as command
from benchmarks.peers import child, environments, inputs, merge_command, questions, results, rounds, shapes, sources
from benchmarks.peers.questions import Peer, Question

MACHINE = {"cpu": "a processor", "cores": 2, "threads": 2, "system": "linux"}
STATE = results.State({"dsee_jax": "5eed", "sides": "51de"}, dict.fromkeys(("ours", "peer", "cut"), "jax==0.10"))
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
        ({"loss": 0.7, "another name": 3.0}, ""),
        ({}, ""),
        ({"another name": 3.0}, "no number in common: another name; of the first side: logits, loss, parameters"),
        ({"loss": 0.7002}, "loss: differs by 0.0002, more than 0.0001"),
        ({"logits": [[1.0, 2.0], [3.0, 400.1]]}, "logits: differs by 0.1, more than 0.04"),
        ({"logits": [[1.0, 2.0]]}, "logits: 4 numbers and 2"),
        ({"loss": float("nan")}, "loss: differs by nan, more than 0.0001"),
        ({"parameters": 1_000_001}, "parameters: differs by 1, more than 0"),
    ],
)
def test_sides_that_compute_other_numbers_are_found(other, difference):
    """The tolerance is 1e-4 of the largest number, and at least of 1; counts are equal."""
    ours = {"loss": 0.7, "logits": [[1.0, 2.0], [3.0, 400.0]], "parameters": 1_000_000}
    assert rounds.check(ours, other, 1e-4) == difference


@pytest.mark.parametrize(
    ("tokens", "difference"),
    [
        ([[5, 6, 7], [8, 9, 10]], ""),
        # The second step of the first row is a near tie, after which the rows continue other texts.
        ([[5, 1, 2], [8, 9, 10]], ""),
        ([[5, 6, 1], [8, 9, 10]], "tokens: row 0 differs at step 2, where the margin of the logits is 0.5"),
        ([[5, 6, 7], [1, 9, 10]], "tokens: row 1 differs at step 0, where the margin of the logits is nan"),
        ([[5, 6, 7], [8, 9]], "tokens: 6 numbers and 5"),
    ],
)
def test_greedy_texts_may_differ_only_from_a_near_tie_on(tokens, difference):
    """A margin below twice the tolerance of 1e-4 is a near tie."""
    ours = {"tokens": [[5, 6, 7], [8, 9, 10]], "margins": [[0.5, 1.9e-4, 0.5], [float("nan"), 0.5, 0.5]]}
    theirs = {"tokens": tokens, "margins": [[0.0] * 3] * 2}
    assert rounds.check(ours, theirs, 1e-4) == difference


def test_the_numbers_of_a_text_are_its_tokens_and_margins_and_with_beams_its_probability():
    logits, tokens = np.log([[[0.5, 0.2, 0.3], [0.1, 0.8, 0.1]]]).astype(np.float32), np.array([[0, 1]])
    greedy = inputs.chosen(logits, tokens, 1)
    assert greedy["tokens"] == [[0, 1]]
    np.testing.assert_allclose(greedy["margins"], np.log([[0.5 / 0.3, 0.8 / 0.1]]), rtol=1e-6)
    mean = (np.log(0.5) + np.log(0.8)) / 2
    np.testing.assert_allclose(inputs.chosen(logits, tokens, 4)["log_probabilities"], [mean], rtol=1e-6)


def test_a_record_has_the_ratios_of_the_question_and_leaves_out_failed_sides():
    sides = answers(ours=[1.0, 1.0, 4.0], peer=[2.0, 4.0, 4.0], cut=[0.5, 0.5, 2.0])
    record = results.record(QUESTION, QUESTION.cases["a case"], sides, pairs=3, machine=MACHINE, state=STATE)
    assert {key: found["seconds"]["median"] for key, found in record["ratios"].items()} == {
        "ours/peer": 0.5,
        "cut/ours": 0.5,
    }
    assert record["sides"]["peer"]["medians"] == {"seconds": 4.0}
    assert record["sources"] == STATE.sources
    assert record["sides"]["peer"]["packages"] == "jax==0.10"
    failed = results.record(QUESTION, {}, sides | {"peer": {"error": "killed"}}, pairs=3, machine=MACHINE, state=STATE)
    assert list(failed["ratios"]) == ["cut/ours"]
    assert failed["sides"]["peer"] == {"error": "killed"}


def test_mfu_counts_forward_and_backward_over_the_fastest_product_of_any_side():
    """A step of frozen kernels has twice the FLOPs of its forward pass."""
    sides = answers(ours=[1.0], peer=[2.0])
    for side, rate in (("ours", 1e9), ("peer", 2e9)):
        sides[side]["rounds"][0]["matmul_flops_per_second"] = rate
    record = results.record(
        QUESTION._replace(training=True), QUESTION.cases["a case"], sides, pairs=1, machine=MACHINE, state=STATE
    )
    expected = 2 * shapes.flops("tiny-bert", 2, 16) / 2e9
    assert record["sides"]["ours"]["mfu"] == pytest.approx(expected)
    assert record["sides"]["peer"]["mfu"] == pytest.approx(expected / 2)


def test_flops_of_bert_base_are_those_of_its_matrices():
    """Two per weight of a layer and token, and twice two per token and number of a head's scores and sums."""
    per_layer = 4 * 768 * 768 + 2 * 768 * 3072 + 2 * 128 * 768
    assert shapes.flops("bert-base", 8, 128) == 2 * 8 * 128 * 12 * per_layer


def recorded(pairs=5, **sides):
    """Return a record of sides with 5 equal rounds; None is a side that failed."""
    good = answers(**{name: [1.0] * pairs for name in ("ours", "peer", "cut") if sides.get(name, True)})
    failed = {name: {"error": "killed"} for name, well in sides.items() if well is None}
    return results.record(QUESTION, QUESTION.cases["a case"], good | failed, pairs=pairs, machine=MACHINE, state=STATE)


def test_a_stored_case_is_complete_with_all_sides_and_pairs():
    assert results.is_complete(recorded(), ("ours", "peer", "cut"), 5)
    assert results.is_complete(recorded(), ("ours", "peer"), 3)
    assert not results.is_complete(None, (), 1)
    assert not results.is_complete(recorded(), ("ours",), 6)
    assert not results.is_complete(recorded(), ("ours", "another"), 5)
    assert not results.is_complete(recorded(peer=None), ("ours", "peer"), 5)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"case": {"batch": 4}}, ["settings"]),
        ({"machine": MACHINE | {"threads": 1}}, ["machine"]),
        ({"state": STATE._replace(sources={"dsee_jax": "0ther", "sides": "51de"})}, ["sources"]),
        ({"state": STATE._replace(packages={"ours": "jax==0.10", "peer": "torch==3"})}, ["packages of peer"]),
        (
            {"question": QUESTION._replace(sides={**QUESTION.sides, "cut": Peer("cut", "ours", options={"form": 1})})},
            ["options of cut"],
        ),
    ],
)
def test_what_changed_since_a_case_was_stored_is_named(change, found):
    now = {"question": QUESTION, "case": QUESTION.cases["a case"], "machine": MACHINE, "state": STATE} | change
    assert results.changes(recorded(), **now) == found


def test_a_record_of_an_older_harness_is_measured_again():
    """Without digests and packages: the state in which it was measured is not known."""
    old = {"settings": QUESTION.cases["a case"], "machine": MACHINE, "sides": {"ours": {"options": {}, "medians": {}}}}
    changed = results.changes(old, QUESTION, QUESTION.cases["a case"], machine=MACHINE, state=STATE)
    assert changed == ["sources", "packages of ours"]


def test_a_lesser_record_never_takes_the_place_of_a_fuller_one():
    def lost(stored, sides, pairs=5):
        return results.lost(stored, QUESTION, sides, pairs)

    assert not lost(None, ["ours"], 1)
    assert not lost(recorded(), ["cut", "peer", "ours"])
    assert lost(recorded(), ["ours", "peer", "cut"], 4) == "has 5 pairs"
    assert lost(recorded(), ["ours", "peer"]) == "has the side cut"
    assert lost(recorded(), ["ours"]) == "has the sides peer, cut"
    # A failed side, and one that the question has no more, are no loss.
    assert not lost(recorded(peer=None, cut=False), ["ours", "cut"])
    without = QUESTION._replace(sides={name: QUESTION.sides[name] for name in ("ours", "peer")})
    assert not results.lost(recorded(), without, ["ours", "peer"], 5)


def test_only_code_counts_in_a_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    file = tmp_path / "code.py"

    def digest(text):
        file.write_text(text)
        return sources.digest([file])

    first = digest('"""Doc."""\nx = 1\n"""About x."""\ndef f():\n    """Return 2."""\n    return 2\n')
    assert digest("# A comment\nx = 1\ndef f():\n\n    return (2)\n") == first
    assert digest("x = 1\ndef f():\n    return 3\n") != first
    assert digest("x = '1'\ndef f():\n    return 2\n") != first


def test_the_digest_of_sides_has_the_modules_that_they_use(monkeypatch):
    """The epoch of PEFT uses its training step; ONNX Runtime runs the exporter as a command."""
    monkeypatch.setattr(sources, "digest", lambda files: {file.stem for file in files})
    shared = {"rounds", "child", "machine", "inputs", "shapes"}
    assert sources.sides(("torch_epoch",)) == shared | {"torch_epoch", "torch_train", "devices"}
    assert sources.sides(("onnx_forward",)) == shared | {"onnx_forward", "onnx_export"}


def test_an_environment_of_other_pins_is_created_again(tmp_path, monkeypatch):
    """The commands of venv and pip are not carried out."""
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"peer": ("wheel==1",)})
    commands = []

    def run(command):
        commands.append(command)
        (tmp_path / "peer").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(environments.subprocess, "run", run)
    own = str(tmp_path / "peer" / "bin" / "python")
    assert environments.python("peer", ["no_such_package"], tmp_path) is None
    for _ in range(2):
        environments.make(tmp_path)
        assert [command[2] for command in commands] == ["venv", "pip"]
        assert environments.python("peer", ["no_such_package"], tmp_path) == own
        assert environments.installed("peer", [], tmp_path).endswith(" wheel==1")
    assert not environments.is_old("peer", tmp_path)
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"peer": ("wheel==2",)})
    assert environments.python("peer", ["no_such_package"], tmp_path) is None
    assert environments.is_old("peer", tmp_path)
    environments.make(tmp_path)
    assert commands[-1][-1] == "wheel==2"
    # This process' own packages stand in.
    assert environments.python("another", ["numpy"], tmp_path) == sys.executable
    assert f"numpy=={np.__version__}" in environments.installed("another", ["numpy"], tmp_path)
    assert "jaxlib==" in environments.installed("", [], tmp_path)


def test_an_environment_that_pip_cannot_install_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ENVIRONMENTS", {"peer": ("wheel==1",)})
    ended = subprocess.CompletedProcess
    monkeypatch.setattr(environments.subprocess, "run", lambda command: ended(command, int("pip" in command)))
    with pytest.raises(
        SystemExit, match=r"peer: pip ended with exit status 1; expected 0: .* --make-environments again$"
    ):
        environments.make(tmp_path)
    assert not environments.is_complete("peer", tmp_path)


def test_a_record_measured_beside_other_work_is_measured_again_and_marked():
    """Up to a tenth of a core is an idle machine."""
    idle, busy = recorded() | {"cores_of_others": 0.1}, recorded() | {"cores_of_others": 0.34}
    assert results.is_complete(idle, ("ours", "peer"), 5)
    assert not results.is_complete(busy, ("ours", "peer"), 5)
    assert "| a case (measured beside other work on 0.3 cores) |" in results.table(QUESTION, {"a case": busy})
    assert "| a case |" in results.table(QUESTION, {"a case": idle})


def test_variables_that_change_figures_are_not_those_of_the_user():
    """The platform, XLA's flags, which are recorded, and what the harness sets stay."""
    dropped = (
        "GLIBC_TUNABLES",
        "MALLOC_ARENA_MAX",
        "JAX_ENABLE_X64",
        "JAX_COMPILATION_CACHE_DIR",
        "PYTORCH_ALLOC_CONF",
    )
    dropped += ("TORCHINDUCTOR_FREEZING", "TORCH_LOGS", "OMP_WAIT_POLICY", "MKL_DYNAMIC", "KMP_AFFINITY")
    kept = {"PATH": "/bin", "JAX_PLATFORMS": "cuda", "XLA_FLAGS": "--xla_flag", "PYTHONPATH": "folder"}
    own = {"JAX_PLATFORMS": "cpu", **rounds.ALLOCATOR}
    found = rounds.environment(dict.fromkeys(dropped, "1") | kept | {"OMP_NUM_THREADS": "9"}, own, 2)
    assert not found.keys() & set(dropped)
    assert {**found, **own, **rounds.threads(2)} == found
    assert [found[name] for name in ("PATH", "XLA_FLAGS")] == ["/bin", "--xla_flag"]
    assert found["PYTHONPATH"].endswith("folder")
    assert rounds.environment(kept, {}, 2)["JAX_PLATFORMS"] == "cuda"


def test_the_table_has_a_row_for_each_case_and_a_column_for_each_ratio(tmp_path):
    sides = answers(ours=[1.0, 1.0, 4.0], peer=[2.0, 4.0, 4.0], cut=[0.05, 0.05, 0.2])
    record = results.record(QUESTION, QUESTION.cases["a case"], sides, pairs=3, machine=MACHINE, state=STATE)
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


def test_the_tables_of_all_stored_questions_are_written(tmp_path, monkeypatch, capsys):
    """Without a name; merging_large is among them, and a GPU has a file of its own."""
    monkeypatch.setattr(sources, "package", lambda name: "a digest")  # the real one reads every file of a package
    for name in ("merging_large", "import"):
        record = results.record(
            question := questions.QUESTIONS[name],
            (case := next(iter(question.cases.items())))[1],
            answers(ours=[1.0]),
            pairs=1,
            machine=MACHINE,
            state=STATE,
        )
        results.write(tmp_path / f"{name}.json", question, {case[0]: record})
    for arguments in (["--table"], ["--table", "import"], ["--table", "--gpu"]):
        monkeypatch.setattr(sys, "argv", ["peers", *arguments, "--out", str(tmp_path), "--work", str(tmp_path)])
        assert command.main() == 0
    assert [path.name for path in tmp_path.glob("*.md")] == ["tables.md"]
    text = (tmp_path / "tables.md").read_text()
    assert "4.5 billion" in text
    assert "**Import**" in text
    assert text in capsys.readouterr().out


def test_the_tables_of_the_documentation_are_those_of_the_stored_figures():
    tables = (results.FOLDER / "tables.md").read_text(encoding="utf-8")
    assert tables == results.tables(questions.QUESTIONS, results.FOLDER)


def test_cores_of_others_are_what_the_machine_used_beside_this_process():
    begin, end = machine.Use(10.0, 100.0, 40.0), machine.Use(30.0, 135.0, 65.0)
    assert machine.others(begin, end) == 0.5
    assert machine.others(begin, end._replace(machine=None)) is None
    # Ticks are coarse.
    assert machine.others(begin, end._replace(own=80.0)) == 0.0
    first = machine.use()
    sum(number * number for number in range(200_000))
    assert machine.use().own >= first.own


def test_every_question_names_modules_environments_and_shapes_that_exist():
    for question in (questions.QUESTIONS | questions.GPU).values():
        for side in question.sides.values():
            assert (rounds.ROOT / "benchmarks" / "peers" / f"{side.module}.py").exists(), side
            assert not side.environment or side.environment in environments.ENVIRONMENTS, side
        for case in (*question.cases.values(), *question.small.values()):
            assert {case.get("shape", "bert-base"), case.get("checkpoints", "bert-base")} <= shapes.SHAPES.keys(), case
        assert {each for pair in question.pairs() for each in pair} <= question.sides.keys()
        # A command chooses for itself.
        assert next(iter(question.sides.values())).options.get("memory", False) is not question.fresh


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
        (["grebsmo", "--sides", "authors", "nobody"], "--sides: no side 'nobody'; expected some of authors, ours"),
        # A side of another question.
        (["grebsmo", "--sides", "keras"], "--sides: no side 'keras'; expected some of authors, ours"),
        (
            ["grebsmo", "import", "--cases", "24 kernels", "nope"],
            "--cases: no case has 'nope'; expected parts of: 24 kernels of 768 x 768; import",
        ),
        (["grebsmo", "--pairs", "0"], "--pairs is 0; expected 1 or more"),
        (["grebsmo", "--threads", "10000"], "--threads is 10000; expected 1 to "),
    ],
)
def test_bad_arguments_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", *arguments])
    with pytest.raises(SystemExit):
        command.main()
    assert message in capsys.readouterr().err


def test_a_partial_command_leaves_a_fuller_record_in_its_place(tmp_path, monkeypatch, capsys):
    """Fewer sides, fewer pairs, and a side that fails; also after the code changed."""
    question, failing = QUESTION._replace(cases={"a case": {}}), set()

    def measure(launches, *, pairs, **more):
        good = answers(**{name: [1.0] * pairs for name in launches})
        return good | {name: {"error": "killed"} for name in failing}

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["peers", "--work", str(tmp_path), "--out", str(tmp_path), *arguments])
        status = command.main()
        written = capsys.readouterr()
        return status, written.out + written.err

    monkeypatch.setattr(questions, "QUESTIONS", {"name": question})
    monkeypatch.setattr(rounds, "measure", measure)
    monkeypatch.setattr(machine, "others", lambda begin, end: 0.0)
    monkeypatch.setattr(sources, "package", lambda name: "a digest")
    assert run("--pairs", "2", "--sides", "peer")[0] == 0
    assert run("--pairs", "3")[0] == 0
    full = (tmp_path / "name.json").read_text()
    assert set(json.loads(full)["cases"]["a case"]["sides"]) == {"ours", "peer", "cut"}
    assert "a case: stored" in run("--pairs", "2", "--sides")[1]
    assert "stored record has 3 pairs; pass --out" in run("--pairs", "2", "--again")[1]
    monkeypatch.setattr(sources, "package", lambda name: "another digest")
    assert "changed since it was stored: sources" in run("--table")[1]
    status, text = run("--pairs", "3", "--sides")
    assert status == 0
    assert "changed since it was stored: sources" in text
    assert "left out: the stored record has the sides peer, cut" in text
    failing.add("peer")
    status, text = run("--pairs", "3")
    assert status == 1
    assert "not stored: the stored record has the side peer" in text
    # Tiny shapes go elsewhere, whatever --out is.
    monkeypatch.setattr(questions, "QUESTIONS", {"name": question._replace(small={"a case": {}})})
    run("--pairs", "1", "--small")
    assert (tmp_path / "name.json").read_text() == full
    assert (tmp_path / "small" / "name.json").exists()
    failing.clear()
    assert run("--pairs", "3")[0] == 0
    assert (
        json.loads((tmp_path / "name.json").read_text())["cases"]["a case"]["sources"]["dsee_jax"] == "another digest"
    )


@pytest.fixture
def measured(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command on invented questions, whose sides take a second, and what it prints."""

    def run(*arguments, **tables):
        for name, table in tables.items():
            monkeypatch.setattr(questions, name, table)
        folders = [f"--work={tmp_path}", f"--out={tmp_path}", f"--environments={tmp_path / 'environments'}"]
        monkeypatch.setattr(sys, "argv", ["peers", *folders, *arguments])
        status = command.main()
        return status, capsys.readouterr()

    def measure(launches, *, pairs, **more):
        return answers(**{name: [1.0] * pairs for name in launches})

    monkeypatch.setattr(rounds, "measure", measure)
    monkeypatch.setattr(machine, "others", lambda begin, end: 0.0)
    monkeypatch.setattr(sources, "package", lambda name: "a digest")
    return run


def test_questions_that_are_left_out_are_listed_and_fail_where_they_are_named(tmp_path, monkeypatch, measured):
    """One lacks its data; one lacks the environment of two peers; one of an environment with older pins."""
    lacking = Peer("them", "theirs", "torch", ("no_such_package",))
    table = {
        "data": QUESTION._replace(cases={"a case": {"task": "rte"}}),
        "peers": QUESTION._replace(cases={"a case": {}}, sides={**QUESTION.sides, "peer": lacking, "cut": lacking}),
    }
    status, written = measured("--pairs", "1", QUESTIONS=table)
    assert status == 0
    assert written.err.splitlines() == [
        f"peers: no environment torch in {tmp_path / 'environments'}; run --make-environments",
        "left out: data (no data), peers (no environment)",
    ]
    assert measured("--pairs", "1", "data")[0] == 1
    marker = tmp_path / "environments" / "torch" / environments.MARKER
    marker.parent.mkdir(parents=True)
    marker.write_text("torch==1")
    status, written = measured("--pairs", "1", "peers")
    assert status == 1
    assert written.err.splitlines() == [
        f"peers: {marker.parent} has other pins; run --make-environments",
        "left out: peers (no environment)",
    ]
    assert measured("--pairs", "1", "peers", "--sides")[0] == 0


def test_a_side_on_the_cpu_fails_on_a_gpu_and_the_card_is_part_of_the_machine(tmp_path, monkeypatch, measured):
    """Before the model is written, here one of a shape that does not exist."""
    sides = {"ours": Peer("us", "ours"), "peer": Peer("them", "theirs", needs=("torch",))}
    question = QUESTION._replace(sides=sides, cases={"a case": {}}, small={"a case": {}}, ratios=())
    monkeypatch.setattr(environments, "python", lambda *more: sys.executable)
    monkeypatch.setattr(environments, "installed", lambda *more: "pins")
    cards = {"jax": "", "torch": ""}
    monkeypatch.setattr(command, "_card", lambda python, library: cards[library])
    large = {"a case": {"shape": "no such shape"}}
    status, written = measured("--gpu", "--pairs", "1", GPU={"name": question._replace(cases=large)})
    assert status == 1
    assert (
        "name: ours failed: jax computes on the CPU; expected a GPU: install the build of jax for CUDA" in written.err
    )
    assert not (tmp_path / "name.json").exists()
    cards["jax"] = "H200"
    status, written = measured("--gpu", "--pairs", "1", GPU={"name": question})
    assert status == 1
    assert "name: peer failed: torch computes on the CPU" in written.err
    stored = results.read(tmp_path / "name.json")["a case"]
    assert list(stored["sides"]) == ["ours"]
    assert stored["machine"]["card"] == "H200"
    cards |= {"jax": "H100", "torch": "H100"}
    status, written = measured("--gpu", "--pairs", "1")
    assert status == 0
    assert set(results.read(tmp_path / "name.json")["a case"]["sides"]) == {"ours", "peer"}
    cards["jax"] = "H200"
    assert "a case: changed since it was stored: machine" in measured("--gpu", "--pairs", "1")[1].out
    cards |= {"jax": "", "torch": ""}
    assert measured("--gpu", "--pairs", "1", "--small")[0] == 0


def test_a_busy_record_is_named_and_measured_again(monkeypatch, measured):
    busy = 0.5
    monkeypatch.setattr(machine, "others", lambda begin, end: busy)
    text = "measured beside other work on 0.5 cores"
    status, written = measured("--pairs", "1", QUESTIONS={"name": QUESTION._replace(cases={"a case": {}})})
    assert status == 0
    assert f"  {text}: on an idle machine the same command measures it again" in written.err
    assert f"name, a case: {text}" in measured("--table")[1].err
    busy = 0.0
    written = measured("--pairs", "1")[1]
    assert f"name, a case: {text}\nname, a case\n" in written.out
    assert "name, a case: stored" in measured("--pairs", "1")[1].out


def test_the_numbers_of_a_merge_are_read_from_all_shards(tmp_path):
    """Float32 with its numbers; of other types the size only."""
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "1.safetensors", {"format": "pt"})
    save_file({"b": np.ones(3, np.float16), "c": np.array([0.5], np.float32)}, tmp_path / "2.safetensors")
    found = merge_command.tensors(tmp_path)
    assert {name: (kind, shape) for name, (kind, shape, _) in found.items()} == {
        "a": ("F32", [2, 3]),
        "b": ("F16", [3]),
        "c": ("F32", [1]),
    }
    assert np.frombuffer(found["a"][2], np.float32).tolist() == [0, 1, 2, 3, 4, 5]
    assert np.frombuffer(found["c"][2], np.float32).tolist() == [0.5]


def test_the_merge_that_is_compared_draws_nothing(tmp_path):
    """DARE with all weights kept, in float32."""
    content = merge_command.recipe(tmp_path, "dare_ties", "float32", density=1.0)
    assert content["dtype"] == "float32"
    assert [model["parameters"] for model in content["models"]] == [
        {"weight": 0.4, "density": 1.0},
        {"weight": 0.6, "density": 1.0},
    ]


def _checks(tmp_path, monkeypatch, case, *modules):
    """Return the numbers by which sides are compared, for a tiny case with a model in ``tmp_path``."""
    monkeypatch.setenv("PEERS_THREADS", "1")
    shapes.write(case["shape"], tmp_path / "model")
    return [module.prepare({**case, "model": str(tmp_path / "model")}).check for module in modules]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("shape", "update", "scan"),
    [("tiny-bert", "lora", False), ("tiny-gpt2", "lora", True), ("tiny-llama", "supertuning", False)],
)
def test_sides_train_equally_many_numbers_on_the_same_kernels(tmp_path, monkeypatch, shape, update, scan):
    """GPT-2's query, key and value are one kernel in PEFT; this Llama has fewer keys than queries.

    With equal factors, the loss says that updates are scaled alike and added to the same kernels.
    """
    pytest.importorskip("peft")
    from benchmarks.peers import ours_train, torch_train

    case = questions._tiny(shape, update=update, compile=False, scan=scan)
    ours, theirs = _checks(tmp_path, monkeypatch, case, ours_train, torch_train)
    assert rounds.check(ours, theirs, 1e-4) == ""
    compared = {"low_rank_parameters", "head_parameters", "updated_weights", "loss", "logits", "dropout"}
    compared |= {"sparse_parameters"} if update == "supertuning" else set()
    compared |= {"tuned_loss"} if shape != "tiny-gpt2" else set()
    assert ours.keys() & theirs.keys() == compared
    # The tiny BERT has random weights so small that no update changes its loss.
    assert shape != "tiny-llama" or abs(ours["tuned_loss"] - ours["loss"]) > 0.01


@pytest.mark.parity
@pytest.mark.parametrize("title", ["tiny, greedy", "tiny, 2 beams"])
def test_sides_generate_the_same_texts(tmp_path, monkeypatch, title):
    pytest.importorskip("torch")
    from benchmarks.peers import ours_generate, torch_generate

    case = {**questions.QUESTIONS["generation"].small[title], "cache": ""}
    ours, theirs = _checks(tmp_path, monkeypatch, case, ours_generate, torch_generate)
    assert ours.keys() == theirs.keys()
    assert rounds.check(ours, theirs, 1e-4) == ""


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["torch"], marks=pytest.mark.parity, id="eager"),
        # Inductor compiles C++ for a minute.
        pytest.param(["torch_compiled", "torch_frozen"], marks=pytest.mark.exhaustive, id="compiled"),
    ],
)
def test_forms_of_the_forward_pass_compute_the_same_logits(tmp_path, monkeypatch, names):
    """Eager, compiled and frozen; PyTorch folds the weights into the program of the last alone."""
    torch = pytest.importorskip("torch")
    from torch._inductor import config, freezing

    from benchmarks.peers import ours_forward, torch_forward

    question = questions.QUESTIONS["inference"]
    case = question.small["tiny"]
    (ours,) = _checks(tmp_path, monkeypatch, {**case, "form": "plain"}, ours_forward)
    monkeypatch.setattr(config, "freezing", False)  # the setting of this process comes back
    folded, freeze = [], freezing.freeze
    monkeypatch.setattr(freezing, "freeze", lambda *arguments: folded.append(name) or freeze(*arguments))
    for name in names:
        torch.compiler.reset()
        (theirs,) = _checks(tmp_path, monkeypatch, {**case, **question.sides[name].options}, torch_forward)
        assert rounds.check(ours, theirs, 1e-4) == ""
    assert folded == [name for name in names if name == "torch_frozen"]


@pytest.mark.parity
@pytest.mark.exhaustive
def test_an_epoch_trains_on_all_tokens_and_with_the_same_dropout(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from benchmarks.peers import ours_epoch, torch_epoch

    case = questions.QUESTIONS["epoch"].small["tiny"]
    inputs.invented(tmp_path / "data", case["examples"])
    case = {**case, "data": str(tmp_path / "data"), "scratch": str(tmp_path)}
    (ours,) = _checks(tmp_path, monkeypatch, case, ours_epoch)
    for grouped in (False, True):
        (theirs,) = _checks(tmp_path, monkeypatch, {**case, "grouped": grouped}, torch_epoch)
        assert rounds.check(ours, theirs, 1e-4) == ""
        assert theirs["dropout"] == 0.1
        assert theirs["tokens"] > 0


@pytest.mark.parity
def test_bfloat16_on_a_gpu_is_automatic_mixed_precision(monkeypatch):
    """PEFT keeps its updates in float32. Elsewhere nothing is cast."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from benchmarks.peers import torch_train

    monkeypatch.setattr(torch, "autocast", lambda *to, enabled: to if enabled else None)
    assert torch_train.precision("cuda", torch.bfloat16) == ("cuda", torch.bfloat16)
    assert torch_train.precision("cuda", torch.float32) is None
    assert torch_train.precision("cpu", torch.bfloat16) is None


def test_a_case_without_its_data_is_left_out_with_the_option_that_gives_it(tmp_path):
    options = command.parser().parse_args(["--work", str(tmp_path), "--model", str(tmp_path)])
    (tmp_path / "model.safetensors").touch()
    case = questions.QUESTIONS["epoch"].cases["MiniLM, RTE"]
    assert command.prepared(case, options) == "no data: pass --data GLUE_DIR with RTE/train.tsv"
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").touch()
    options.data = tmp_path
    assert command.prepared(case, options) == "no data: pass --data GLUE_DIR with RTE/dev.tsv"
    (tmp_path / "model.safetensors").unlink()
    expected = f"no model: {tmp_path} has no model.safetensors; pass the folder of a model by --model"
    assert command.prepared(case, options) == expected


def test_the_list_names_every_question_and_case():
    text = command.listing(questions.QUESTIONS)
    assert all(name in text and all(case in text for case in each.cases) for name, each in questions.QUESTIONS.items())


@pytest.mark.slow
def test_a_question_is_measured_from_the_command_and_is_stored(tmp_path, monkeypatch, capsys):
    """The import of packages: processes that start fast."""
    monkeypatch.setattr(machine, "others", lambda begin, end: 0.0)
    monkeypatch.setattr(sys, "argv", ["peers", "import", "--small", "--pairs", "1", "--sides", "--work", str(tmp_path)])
    for said in ("import, import\n", "import, import: stored\n"):
        assert command.main() == 0
        assert said in capsys.readouterr().out
    stored = json.loads((tmp_path / "small" / "import.json").read_text())["cases"]["import"]
    assert 0 < stored["sides"]["ours"]["medians"]["seconds"] < 60
