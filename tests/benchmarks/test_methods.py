"""The comparison of methods: records in PEFT's schema, intervals, differences, and the command end to end."""

import functools
import json
import subprocess
import sys

import pytest

import tiny
from benchmarks import experiments, methods, records, runs, tables
from benchmarks.experiments import Experiment
from benchmarks.runs import RESULTS, ROOT
from peft_records import unreadable
from runs import COSTS

FIGURES = {
    **COSTS,
    "final": {"accuracy": 0.75, "loss": 0.5},
    "choose": {"accuracy": 0.7, "loss": 0.6},
    "train_seconds": 10.0,
    "train_tokens_per_second": 60.0,
    "trainable_fraction_with_head": 0.12,
    "backbone_parameters": 100,
    "model_bytes": 4000,
    "peak_memory_bytes": 5000,
    "kept": {"heads": [2], "neurons": [3]},
    "flops_per_example": {"length": 8, "dense": 8 * (100 + 32), "final": 8 * (60 + 16)},
    "environment": {"device": "cpu: cpu"},
    "stages": [
        {"name": "draw", "steps": 10, "metrics": {"accuracy": 0.4}},
        {"name": "tune", "steps": 20, "metrics": {"accuracy": 0.75}},
    ],
}


def record(folder, **changes):
    """Return the record of a made-up run of a search of 10 steps and 20 steps of tuning."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(FIGURES | changes))
    (folder / "hashes.json").write_text(
        json.dumps({"base": {"*.safetensors": "aa"}, "data": {"train": "bb", "dev": "cc"}})
    )
    log = [
        ("before", 0, {"metrics": {"accuracy": 0.3}}),
        ("search", 10, {"loss": 0.9, "tokens_per_second": 10.0}),
        ("search", 10, {"coefficients": {}}),
        ("draw", 0, {"metrics": {"accuracy": 0.4}}),
        ("tune", 10, {"loss": 0.8, "tokens_per_second": 100.0}),
        ("tune", 10, {"metrics": {"accuracy": 0.6, "loss": 0.7}}),
        ("tune", 20, {"loss": 0.6, "tokens_per_second": 120.0}),
        ("tune", 20, {"metrics": {"accuracy": 0.7, "loss": 0.6}}),
    ]
    lines = [json.dumps({"stage": stage, "step": step, **figures}) for stage, step, figures in log]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    config = runs.settings(ROOT / "configs" / "recommended_lora.yaml", ["--train.batch_size=4"])
    about = {"task": "sst2", "method": "lora", "model": "tiny", "seed": 0, "score": "accuracy", "total_time": 11.0}
    about["resumed"] = False
    return records.of_run(folder, config, experiment_name="lora/tiny-sst2", **about) | {"config": config}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A record, which no test changes."""
    return record(tmp_path_factory.mktemp("run"))


def stored(folder, made, *, base="tiny", method="lora", seed=0, valid=0.7, test=0.75, epochs=5.0, **changes):
    """Write a record that differs from ``made`` in the given figures, where `methods.finish` writes it."""
    *before, last = made["train_info"]["metrics"]
    metrics = [*before, last | {"valid accuracy": valid, "test accuracy": test}]
    train = made["config"]["train"] | {"seed": seed, "epochs": epochs}
    done = {
        "run_info": made["run_info"] | {"model": base, "method": method, "seed": seed},
        "train_info": made["train_info"] | {"metrics": metrics},
        "meta_info": made["meta_info"],
        "config": made["config"] | {"train": train},
        **changes,
    }
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / f"{base}_sst2_{method}_seed{seed}.json").write_text(json.dumps(done))


def tabulated(folder, *options):
    """Return the rows of the tables of a call."""
    methods.tabulate(methods.parsed([f"--data={folder}", f"--results={folder / 'results'}", *options]))
    return json.loads((folder / "results.json").read_text())["rows"]


def test_record_has_the_sections_and_names_of_peft(tmp_path):
    """As in the files of PEFT's method comparison; the steps of all stages count together."""
    made = record(tmp_path)
    assert made.keys() == {"run_info", "train_info", "meta_info", "config"}
    info, trained = made["run_info"], made["train_info"]
    names = {"created_at", "total_time", "experiment_name", "train_config", "peft_config", "error_msg"}
    assert names <= info.keys()
    assert (info["peft_config"]["peft_type"], info["peft_config"]["rank"]) == ("LORA", 16)
    names = {"accelerator_memory_max", "train_time", "file_size", "num_trainable_params", "num_total_params", "status"}
    assert names <= trained.keys()
    assert (trained["num_trainable_params"], trained["num_total_params"]) == (12, 102)
    assert made["meta_info"].keys() == {"model_info", "dataset_info", "package_info", "system_info"}
    first, second, last = trained["metrics"]
    assert first == {
        **{"step": 20, "valid accuracy": 0.6, "valid loss": 0.7, "train loss": 0.8, "train samples": 80},
        # The evaluation follows both the search and the first half of the tuning.
        "tokens / sec": 55.0,
    }
    assert (second["step"], second["tokens / sec"]) == (30, 120.0)
    assert last == {
        **{"step": 30, "test accuracy": 0.75, "test loss": 0.5, "train loss": 0.6, "train samples": 120},
        **{"valid accuracy": 0.7, "valid loss": 0.6},
        **{"train total tokens": 600, "forgetting": None},
    }
    assert trained["seconds_per_step"] == pytest.approx(600 / 30 / 100)


def test_peft_reads_the_records(tmp_path):
    """The reader of PEFT's method comparison indexes these keys and takes no default; STS-B has no accuracy."""
    for final, accuracy in (({"accuracy": 0.75}, 0.75), ({"pearson": 0.9}, None), ({"exact_match": 0.5}, 0.5)):
        done = record(tmp_path, final=final)
        assert unreadable(done) == []
        assert done["train_info"]["metrics"][-1]["test accuracy"] == accuracy
    kept = {path.stem: json.loads(path.read_text()) for path in (RESULTS / "methods").glob("*.json")}
    assert kept
    assert {name: missing for name, each in kept.items() if (missing := unreadable(each))} == {}


def test_file_size_is_that_of_the_adapter_where_the_model_is_unchanged(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(b"x" * 70)
    assert record(tmp_path, weight_sparsity=0.0)["train_info"]["file_size"] == 70
    assert record(tmp_path, weight_sparsity=0.5)["train_info"]["file_size"] == 4000


def test_flops_of_a_length_are_those_of_the_run_at_its_own_length(tmp_path):
    made = record(tmp_path)
    assert records.flops(made, 8) == pytest.approx({"dense": 8 * 132, "final": 8 * 76})
    assert records.flops(made, 4) == pytest.approx({"dense": 4 * (100 + 16), "final": 4 * (60 + 8)})


def test_interval_is_that_of_students_t():
    """t with two degrees of freedom is 4.3027, with one 12.7062; one value has no interval."""
    assert records.interval([90.0, 91.0, 92.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert records.interval([1.0, 2.0]) == pytest.approx(12.7062 * 0.5**0.5 / 2**0.5, rel=1e-4)
    assert records.interval([3.0]) is None


def test_differences_are_of_equal_seeds(tmp_path):
    """The baseline has a seed that the method lacks; its validation half is better there."""
    scores = {"lora": {0: 0.75, 1: 0.5, 2: 0.25}, "dsee_70": {0: 0.7, 2: 0.3}}
    labels = {"title": "Tiny", "label": "x", "model": "tiny", "task": "sst2"}
    rows = [
        labels
        | {"method": method}
        | tables.row(
            {
                seed: record(
                    tmp_path, final={"accuracy": value}, choose={"accuracy": 0.9 if seed == 1 else value + 0.1}
                )
                for seed, value in by_seed.items()
            }
        )
        for method, by_seed in scores.items()
    ]
    first, second = tables.compared(rows, "lora")
    assert (first["mean"], first["gap"], first["gap_interval"]) == (50.0, 0.0, 0.0)
    assert (second["mean"], second["gap"]) == (pytest.approx(50.0), pytest.approx(0.0))
    assert second["gap_interval"] == pytest.approx(12.7062 * 5.0, rel=1e-4)
    assert (first["choice"], first["choice_gap"]) == (pytest.approx(70.0), 0.0)
    assert (second["choice"], second["choice_gap"]) == (pytest.approx(60.0), pytest.approx(0.0))
    assert tables.compared([second], "lora")[0]["choice_gap"] is None


def test_rows_of_other_seeds_stand_in_a_table_of_their_own(tmp_path, made):
    """A row of one seed changes no figure of the rows of three, and each table names the seeds of its means."""
    for seed, valid in enumerate((0.7, 0.8, 0.9)):
        stored(tmp_path, made, seed=seed, valid=valid)
        stored(tmp_path, made, method="dsee_70", seed=seed, valid=valid - 0.02 * seed)
    before = tabulated(tmp_path)
    stored(tmp_path, made, method="dsee_80", valid=0.75, test=0.7)
    rows = tabulated(tmp_path)
    assert rows[:2] == before
    text = (tmp_path / "results.md").read_text()
    first, second = (
        text.index(", seeds 0, 1 and 2: accuracy x 100, FLOPs of 8 tokens"),
        text.index(", seed 0: accuracy"),
    )
    costs = "12.00% | 50% | 0.00 G (58%) | 0.0 MB |  |  | 0.00 GB | 0.200 s |"
    lines = (
        f"| LoRA | 75.0 ± 0.0 |  | 80.0 |  | {costs}",
        f"| DSEE, 70 % zeros | 75.0 ± 0.0 | +0.0 ± 0.0 | 78.0 | -2.0 | {costs}",
        f"| DSEE, 80 % zeros | 70.0 | -5.0 | 75.0 | +5.0 | {costs}",
    )
    lora, full, single = (text.index(line) for line in lines)
    assert first < lora < full < second < single


def test_commits_and_resumed_runs_of_a_table_are_named(tmp_path, made):
    """A record stays when the code changes, and that of a resumed run has the memory of its last process."""

    def of(commit, *, resumed):
        packages = made["meta_info"]["package_info"] | {"dsee_jax-commit-hash": commit}
        return made | {
            "run_info": made["run_info"] | {"resumed": resumed},
            "meta_info": made["meta_info"] | {"package_info": packages},
        }

    stored(tmp_path, of("b", resumed=None), seed=0)
    stored(tmp_path, of("b", resumed=False), seed=1)
    assert [(row["commits"], row["resumed"]) for row in tabulated(tmp_path)] == [(["b"], [])]
    text = (tmp_path / "results.md").read_text()
    assert "commits of this library" not in text
    assert "Resumed" not in text
    stored(tmp_path, of("a", resumed=True), seed=1)
    stored(tmp_path, of(None, resumed=False), method="full")
    full, lora = tabulated(tmp_path)
    assert (full["commits"], lora["commits"], lora["resumed"]) == (["unknown"], ["a", "b"], [1])
    text = (tmp_path / "results.md").read_text()
    assert "Runs of 3 commits of this library; `commits` in the JSON file has those of each row.\n" in text
    assert "Resumed runs, whose memory is that of their last process: LoRA (seed 1).\n" in text


def test_stored_config_with_fewer_keys_is_equal():
    """A key that a later version adds has its default value, also in a nested group."""
    now = runs.settings(ROOT / "configs" / "recommended_lora.yaml", [])
    before = json.loads(json.dumps(now))
    del before["train"]["warmup"], before["train"]["rates"]["b"]
    assert runs.equal(before, now)
    before["train"]["rates"]["a"] = 2.0
    assert not runs.equal(before, now)


def test_stored_config_with_a_key_that_is_gone_differs():
    now = runs.settings(ROOT / "configs" / "recommended_lora.yaml", [])
    assert not runs.equal(now | {"gone": 1}, now)
    assert runs.equal(now | {"gone": 1}, now | {"gone": 1})


@functools.cache
def small(method):
    """Return the settings of a small run of a method."""
    row = (methods.METHODS | methods.ABLATIONS)[method]
    path = ROOT / "configs" / f"recommended_{row.recipe}.yaml"
    return runs.settings(path, [*row.overrides, *methods.TASKS["rte"].overrides, methods.SPLIT, *methods.SMALL])


@pytest.mark.parametrize("method", methods.METHODS | methods.ABLATIONS)
def test_every_method_is_a_config(method):
    """Known keys and possible values, also of a small run, which is of few steps."""
    assert small(method)["train"]["least_steps"] == 0


def test_no_two_methods_are_the_same_run():
    """Equal configs under two names show a difference of zero, at the cost of a run."""
    rows = [*methods.METHODS, *methods.ABLATIONS]
    assert len({json.dumps(small(method)) for method in rows}) == len(rows)


def test_tables_keep_the_records_of_earlier_calls(tmp_path, made):
    """Models and seeds that the last call does not name stay; the speed is that of any seed."""
    speed = {"mean_length": 4, "throughput_ratio": 2.0, "latency_ratio": 3.0, "machine": "a", "device": "cpu"}
    speed["final"] = {"examples_per_second": 5.0, "latency_seconds": 0.1}
    for base, seed in (("mpnet", 0), ("minilm", 0), ("minilm", 10), ("minilm", 2)):
        stored(tmp_path, made, base=base, seed=seed)
    stored(tmp_path, made, base="minilm", seed=1, inference_info=speed)
    first, second = tabulated(tmp_path, "--seeds", "0")
    assert (first["model"], [*first["scores"]]) == ("minilm", ["0", "1", "2", "10"])
    assert (second["model"], [*second["scores"]]) == ("mpnet", ["0"])
    assert (first["throughput_ratio"], first["length"], second["length"]) == (2.0, 4, 8)


def test_a_row_has_the_records_of_one_config(tmp_path, made):
    """A record of an earlier recipe is no other seed of the present one."""
    earlier = made | {"run_info": made["run_info"] | {"created_at": "2000-01-01T00:00:00+00:00"}}
    stored(tmp_path, earlier, seed=0, epochs=7.0)
    stored(tmp_path, earlier, seed=1)
    stored(tmp_path, made, seed=2)
    assert [[*row["scores"]] for row in tabulated(tmp_path)] == [["1", "2"]]


def test_records_of_several_machines_make_one_table(tmp_path, made):
    """Each record says its machine, and the table names several; seeds of another config or dev set are left out."""
    assert made["run_info"]["machine"]

    def at(machine, hour, **meta):
        return made | {
            "run_info": made["run_info"] | {"machine": machine, "created_at": f"2026-01-01T{hour:02}:00:00+00:00"},
            "meta_info": made["meta_info"] | meta,
        }

    stored(tmp_path, at("b", 1), seed=0, method="full")
    stored(tmp_path, at("a", 1), seed=0)
    stored(tmp_path, at("b", 2), seed=1)
    stored(tmp_path, at("b", 1), seed=2, epochs=7.0)
    stored(tmp_path, at("b", 1, dataset_info={"sst2": {"sha256": {"train": "bb", "dev": "old"}}}), seed=3)
    # Training examples are drawn by the seed.
    stored(tmp_path, at("b", 1, dataset_info={"sst2": {"sha256": {"train": "other", "dev": "cc"}}}), seed=4)
    full, lora = tabulated(tmp_path)
    assert (full["method"], [*full["scores"]], full["machines"]) == ("full", ["0"], ["b"])
    assert (lora["method"], [*lora["scores"]], lora["machines"]) == ("lora", ["0", "1", "4"], ["a", "b"])
    line = "Runs of several machines, whose seconds a step are not to be compared: a; b."
    assert line in (tmp_path / "results.md").read_text()
    stored(tmp_path, at("b", 3), seed=2, epochs=7.0)
    assert [[*row["scores"]] for row in tabulated(tmp_path)] == [["0"], ["2"]]
    assert line not in (tmp_path / "results.md").read_text()


def test_speeds_of_several_machines_are_named(tmp_path, made):
    """Their examples a second are not to be compared."""
    speed = {"mean_length": 4, "throughput_ratio": 2.0, "latency_ratio": 3.0, "device": "cpu"}
    speed["final"] = {"examples_per_second": 5.0, "latency_seconds": 0.1}
    for method, machine in (("lora", "a"), ("full", "b")):
        stored(tmp_path, made, method=method, inference_info=speed | {"machine": machine})
    tabulated(tmp_path)
    line = "Speeds of several machines; compare the ratios, not examples a second: a, cpu; b, cpu."
    assert line in (tmp_path / "results.md").read_text()


def call(folder, *more):
    """Return the options of a small call on a tiny model, whose files it writes if there are none."""
    if not (folder / "base").exists():
        tiny.bert(folder / "base", num_hidden_layers=1, head=False)
        glue(folder / "glue")
    places = [f"--data={folder / 'glue'}", f"--base=tiny={folder / 'base'}", f"--runs={folder / 'runs'}"]
    return methods.parsed([*places, "--small", "--seeds", "0", *more])


SST2, STSB, RTE = (
    Experiment("tiny", task, method) for task, method in (("sst2", "lora"), ("stsb", "full"), ("rte", "lora"))
)


def current(folder, made, *chosen):
    """Write current records of experiments, whose folders are gone."""
    for each in chosen:
        options = call(folder)
        run = methods.described(each, 0, options)
        done = made | {
            "run_info": made["run_info"] | {"model": each.base, "task": each.task, "method": each.method},
            "meta_info": made["meta_info"] | run.inputs,
            **{"config": run.config, "folder": run.out.name},
        }
        options.results.mkdir(parents=True, exist_ok=True)
        experiments.record(each, 0, options).write_text(json.dumps(done))


def test_record_of_other_data_or_of_another_model_is_not_current(tmp_path, made):
    """Also of a task that starts from the model of another run, whose data and pretrained model count too."""
    call(tmp_path)
    current(tmp_path, made, SST2, STSB, RTE)

    def seen():
        runs = [methods.described(each, 0, call(tmp_path)) for each in (SST2, STSB, RTE)]
        return [bool(run.stored) for run in runs], {run.out for run in runs}

    first = seen()
    assert first[0] == [True, True, True]
    for path, expected in (
        (tmp_path / "glue" / "SST-2" / "dev.tsv", [False, True, True]),
        (tmp_path / "glue" / "RTE" / "train.tsv", [True, True, False]),
        (tmp_path / "glue" / "STS-B" / "train.tsv", [True, False, False]),
        (tmp_path / "base" / "config.json", [False, False, False]),
    ):
        before = path.read_text()
        changed = (
            before.replace("\t1", "\t0", 1)
            if "\t1" in before
            else before.replace("\tentailment", "\tnot_entailment", 1)
        )
        path.write_text(changed if changed != before else before + "\n")
        now = seen()
        assert now[0] == expected
        assert len(now[1] & first[1]) == sum(expected)
        path.write_text(before)
    assert seen() == first


def test_runs_without_their_folders_keep_their_records(tmp_path, made, monkeypatch, capsys):
    """Nothing is trained, not even the run that another starts from; one line names the missing speeds."""
    call(tmp_path)
    current(tmp_path, made, SST2, STSB, RTE)
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("a finished run is repeated"))
    arguments = [f"--data={tmp_path / 'glue'}", f"--base=tiny={tmp_path / 'base'}", f"--runs={tmp_path / 'runs'}"]
    arguments += ["--small", "--seeds", "0", "--only", "tiny/sst2/lora", "tiny/rte/lora"]
    assert methods.main(arguments) == 0
    line = "no speed of tiny_sst2_lora_seed0, tiny_rte_lora_seed0: their folders are gone, and their records stay"
    assert capsys.readouterr().err.startswith(line)


def test_speed_runs_again_what_is_gone(tmp_path, made, monkeypatch):
    """The run, after the one that it starts from, under the names of their records; its record then has a speed."""
    options = call(tmp_path, "--speed")
    current(tmp_path, made, STSB, RTE)
    trained = []

    def train(config, out, overrides, **_):
        trained.append(out.name)
        record(out)

    def infer(command, **more):
        if "benchmarks.inference" not in command:
            return run(command, **more)
        (options.runs / command[3] / "inference.json").write_text('{"latency_ratio": 0.5}')

    run = subprocess.run
    # The made-up figures have an accuracy.
    monkeypatch.setitem(methods.TASKS, "stsb", methods.TASKS["stsb"]._replace(score="accuracy"))
    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(methods.subprocess, "run", infer)
    names = [experiments.stored(each, 0, options)["folder"] for each in (STSB, RTE)]
    assert methods.measure(RTE, options)
    assert trained == names
    assert experiments.stored(RTE, 0, options)["inference_info"] == {"latency_ratio": 0.5}


def test_record_says_whether_an_earlier_process_began_the_run(tmp_path, monkeypatch):
    """``total_time`` and memory are of the last process, and no file of the run tells that there was another."""
    options, begun = call(tmp_path), []
    options.results.mkdir(parents=True)

    def train(config, out, overrides, **_):
        out.mkdir(parents=True, exist_ok=True)
        record(out)
        begun.append(out)
        if len(begun) == 1:
            raise subprocess.CalledProcessError(1, "train.py")

    monkeypatch.setattr(runs, "train", train)
    with pytest.raises(subprocess.CalledProcessError):
        methods.finish(SST2, 0, options)
    assert methods.finish(SST2, 0, options)["run_info"]["resumed"] is True
    (options.results / "tiny_sst2_lora_seed0.json").unlink()
    methods.shutil.rmtree(begun[0])
    assert methods.finish(SST2, 0, options)["run_info"]["resumed"] is False
    assert len({*begun}) == 1


def test_unreadable_data_are_one_line_before_any_run(tmp_path, capsys):
    call(tmp_path)
    (tmp_path / "glue" / "SST-2" / "dev.tsv").unlink()
    places = [f"--data={tmp_path / 'glue'}", f"--base=tiny={tmp_path / 'base'}", f"--runs={tmp_path / 'runs'}"]
    assert methods.main([*places, "--small", "--only", "tiny/*/lora"]) == 2
    assert "dev.tsv" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_rows_of_a_task_start_from_one_model():
    """A start that was trained again gives other weights; a table of both would compare the starts."""

    def started(model, day):
        return {"run_info": {"created_at": f"2026-01-0{day}"}, "meta_info": {"model_info": model}}

    group = {"lora": {0: started("a", 1), 1: started("b", 3)}, "full": {0: started("a", 2)}}
    assert experiments.from_one_model(group) == {"lora": {1: started("b", 3)}}
    assert experiments.from_one_model({}) == {}


def test_ablations_are_ordered_by_the_half_that_chooses(tmp_path, made):
    """The half that scores would order them the other way. Means of one seed do not compare with those of two."""
    for method, valid, test in (("dsee_70", 0.8, 0.5), ("dsee_70_wabs", 0.6, 0.9), ("dsee_70_wanda", 0.7, 0.7)):
        stored(tmp_path, made, method=method, valid=valid, test=test)
    for seed in (0, 1):
        stored(tmp_path, made, method="dsee_70_ria", seed=seed, valid=0.1)
    order = {row["method"]: round(row["choice"]) for row in tabulated(tmp_path)}
    assert [*order.items()] == [("dsee_70", 80), ("dsee_70_ria", 10), ("dsee_70_wanda", 70), ("dsee_70_wabs", 60)]


def glue(folder):
    """Write SST-2, STS-B and RTE of a few sentences in GLUE's layout."""
    heads = {"SST-2": "sentence\tlabel", "STS-B": "sentence1\tsentence2\tscore", "RTE": "sentence1\tsentence2\tlabel"}
    for name, head in heads.items():
        (folder / name).mkdir(parents=True)
        for split, count in (("train", 64), ("dev", 16)):
            rows = [head]
            for number in range(count):
                first, second = (" ".join(tiny.WORDS[(number + k) % 16] for k in ks) for ks in ((0, 3, 5), (1, 2, 7)))
                label = {"SST-2": f"{number % 2}", "STS-B": f"{number % 6}.0"}.get(
                    name, ("entailment", "not_entailment")[number % 2]
                )
                rows.append("\t".join([first, *([second] if name != "SST-2" else []), label]))
            (folder / name / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.exhaustive
def test_command_runs_measures_and_does_nothing_twice(tmp_path):
    """Two methods and a task that starts from another run, on a tiny model; the second call leaves all files as they are."""
    tiny.bert(tmp_path / "base", num_hidden_layers=1, head=False)
    command = [
        *(sys.executable, "-m", "benchmarks.methods", "--small", "--seeds", "0", "1"),
        *(f"--data={glue(tmp_path / 'glue')}", f"--base=tiny={tmp_path / 'base'}", f"--runs={tmp_path / 'runs'}"),
        *("--only", "tiny/sst2/lora", "tiny/sst2/dsee_80", "tiny/rte/lora"),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    results = tmp_path / "runs" / "results"
    names = {"tiny_sst2_lora_seed0", "tiny_sst2_lora_seed1", "tiny_sst2_dsee_80_seed0", "tiny_rte_lora_seed0"}
    assert names | {"tiny_rte_lora_seed1", "tiny_stsb_full_seed0"} == {path.stem for path in results.glob("*.json")}
    first = json.loads((results / "tiny_sst2_lora_seed0.json").read_text())
    assert first["inference_info"]["latency_ratio"] > 0
    rows = json.loads(results.with_suffix(".json").read_text())["rows"]
    assert [row["method"] for row in rows if row["task"] == "sst2"] == ["lora", "dsee_80"]
    assert (tmp_path / "runs" / first["folder"] / "model").exists()
    assert not (tmp_path / "runs" / first["folder"] / "checkpoints").exists()
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    subprocess.run(command, check=True, cwd=ROOT)
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
