"""The comparison of decoders: its configs, its data, its peers' records, and PEFT on the library's own batches."""

import functools
import json
import math
import subprocess
import sys

import jax
import numpy as np
import pytest

import decoders as tiny_decoders
import runs
from benchmarks import decoder_data, decoder_speed, decoder_tokens, decoders, experiments, records, timed_steps
from benchmarks.experiments import Experiment
from benchmarks.runs import ROOT
from dsee_jax.errors import InputError
from dsee_jax.train import setup
from peft_records import unreadable


def options(folder, *more):
    """Return the options of a small call."""
    return decoders.parsed([f"--data={folder}", f"--runs={folder / 'runs'}", "--small", *more])


@functools.cache
def config(method, task="e2e"):
    """Return the config of a record."""
    return decoders.configured(Experiment("tiny", task, method), 0, decoders.parsed(["--data=data"]))


@pytest.mark.parametrize("method", decoders.METHODS)
def test_every_method_makes_the_same_passes(method):
    """Known keys and possible values; tuning and re-tuning together are the passes of the task, and no path is kept."""
    made = config(method)
    train = made["train"]
    again = train["retune_epochs"] if made["prune"]["kind"] != "none" else 0
    assert train["epochs"] + again == decoders.TASKS["e2e"].passes
    assert made["model"]["path"] == "tiny"
    assert made["data"]["held_text"] == "held.txt"


def test_sst2_has_short_answers_from_json_lines():
    made = config("lora", "sst2")
    assert (made["data"]["source"], made["generate"]["new_tokens"], made["train"]["epochs"]) == ("jsonl", 4, 2)


def test_a_peer_has_the_config_of_its_twin():
    """Rank, alpha, rate, data and steps; the scale of rsLoRA is alpha over the root of the rank."""
    assert config("peft_lora") == config("lora")
    assert config("peft_rslora") == config("rslora")
    delta = config("rslora")["delta"]
    assert delta["alpha"] / delta["rank"] == pytest.approx(decoders.ALPHA / math.sqrt(decoders.RANK), rel=1e-5)


def sources(folder):
    """Write E2E of eight prompts with two texts each, SST-2 and RTE."""
    for name in ("e2e", "glue/SST-2", "glue/RTE"):
        (folder / name).mkdir(parents=True)
    rows = "".join(f'"name[P{n}], food[x]","P{n}, ""{k}""."\n' for n in range(8) for k in ("a", "b"))
    for name in ("devset.csv", "testset_w_refs.csv"):
        (folder / "e2e" / name).write_text("\ufeffmr,ref\n" + rows, encoding="utf-8")
    for split in ("train", "dev"):
        lines = "".join(f"it 's \"good{n} \t{n % 2}\n" for n in range(4))
        (folder / "glue" / "SST-2" / f"{split}.tsv").write_text("sentence\tlabel\n" + lines)
    (folder / "glue" / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tA b.\tc\tentailment\n")
    return folder


def test_scored_prompts_keep_all_their_texts(tmp_path):
    """Every fourth prompt with both texts; SST-2 as prompts, quotes as they are; the second call writes nothing."""
    out = tmp_path / "out"
    decoder_data.write(sources(tmp_path / "in"), out)
    lines = (out / "e2e" / "testset_w_refs.csv").read_text().splitlines()
    assert [line.split(",")[0].strip('"') for line in lines] == ["mr", "name[P0]", "name[P0]", "name[P4]", "name[P4]"]
    examples = [json.loads(line) for line in (out / "sst2" / "dev.jsonl").read_text().splitlines()]
    assert examples[1] == {"prompt": "Review: it 's \"good1\nSentiment:", "completion": " positive"}
    assert (out / "held.txt").read_text() == "A b."
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    decoder_data.write(tmp_path / "in", out)
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}


def test_missing_data_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"devset\.csv: No such file or directory; --data is the folder that holds e2e"
    ):
        decoder_data.write(tmp_path, tmp_path / "out")


def test_interpreter_without_peft_is_refused_before_any_run(tmp_path, capsys):
    assert decoders.main([f"--data={tmp_path}", f"--runs={tmp_path / 'runs'}", f"--peft={tmp_path / 'python'}"]) == 2
    assert "expected a Python interpreter" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def batch(*lengths, padding=0):
    """Return a row of packed texts of these lengths and padding; the last token but one of each text has a weight."""
    numbers = [*range(1, len(lengths) + 1), 0]
    segments = np.repeat(numbers, [*lengths, padding])[None].astype(np.int32)
    weights = np.zeros(segments.shape, np.float32)
    weights[0, np.cumsum(lengths) - 2] = 1
    ids = np.arange(segments.size, dtype=np.int32)[None] % 11
    return {"input_ids": ids, "attention_mask": segments, "labels": np.roll(ids, -1), "weights": weights}


def test_batches_of_a_peer_are_padded_to_the_longest():
    arrays = decoder_tokens.arrays("train", [batch(2, 1), batch(3, 2)])
    assert arrays["train_lengths"].tolist() == [3, 5]
    assert arrays["train_segments"].tolist() == [[[1, 1, 2, 0, 0]], [[1, 1, 1, 2, 2]]]
    assert arrays["train_ids"][0].tolist() == [[0, 1, 2, 0, 0]]


FIGURES = {
    "before": {"choose": 2.0, "score": 2.5, "held": 3.0},
    "losses": [2.4, 1.5],
    "seconds": [9.0, 1.0],
    "tokens": 40,
    "evaluations": [{"step": 2, "loss": 1.25}],
    "best_step": 2,
    "choose": 1.25,
    "final": {"score": 1.5, "held": 3.25},
    "trained_parameters": 5,
    "total_parameters": 100,
    "file_size": 70,
    "peak_memory_bytes": 5000,
    "packages": {"torch": "2", "transformers": "5", "peft": "0"},
    "config": {"peft_type": "LORA", "r": 8},
}


def peer(seed=0, method="peft_lora"):
    """Return the record of a made-up run of PEFT, or of a method of this library with the same figures."""
    about = experiments.labels(Experiment("tiny", "e2e", method), seed, "loss", 11.0, resumed=False)
    made = records.of_peer(FIGURES, {"bleu": 40.0}, config(method), **about)
    made["meta_info"] |= {"model_info": {}, "dataset_info": {"e2e": {"sha256": {}}}}
    return made | {"config": config(method), "folder": f"{method}_run"}


def test_peft_reads_the_records_of_a_peer():
    """With the versions of its packages, which are not those of this process."""
    made = peer()
    assert unreadable(made) == []
    assert made["meta_info"]["package_info"]["torch-version"] == "2"


def recorded(folder, *methods, **more):
    """Write the records of made-up runs; return the options of a call, and the experiments."""
    made = options(folder, f"--results={folder / 'results'}", *more.pop("options", ()))
    made.results.mkdir(exist_ok=True)
    experiments_ = [Experiment("tiny", "e2e", method) for method in methods]
    for each in experiments_:
        experiments.record(each, 0, made).write_text(json.dumps(peer(method=each.method) | more))
    return made, experiments_


@pytest.fixture
def measured(monkeypatch):
    """Let the processes that measure answer at once; yield the list of their methods, and the digests that they answer."""
    begun, digests, run = [], {}, subprocess.run

    def answer(command, **more):
        if command[0] not in decoders.METHODS:
            return run(command, **more)
        begun.append(command[0])
        figures = {
            **{"seconds_per_step": 2.0, "written_tokens_per_second": 30.0},
            **{"digest": digests.get(command[0], "aa")},
        }
        return subprocess.CompletedProcess(command, 0, stdout=f"some line\n{json.dumps(figures)}\n")

    monkeypatch.setattr(decoders, "speed_command", lambda experiment, seed, options: [experiment.method])
    monkeypatch.setattr(subprocess, "run", answer)
    return begun, digests


def finished(made, *methods):
    """Make the folders of runs."""
    for method in methods:
        (made.runs / f"{method}_run").mkdir(parents=True)
        (made.runs / f"{method}_run" / "metrics.json").touch()


def test_methods_of_a_call_have_one_measurement(tmp_path, measured):
    """All are measured in turns, and again where one has none; a table of one measurement is not measured again."""
    begun, _ = measured
    made, (lora, peft) = recorded(tmp_path, "lora", "peft_lora")
    finished(made, "lora")
    decoders.measure([lora], made)
    decoders.measure([lora, peft], made)
    decoders.measure([lora, peft], made)
    assert begun == ["lora", "lora", "peft_lora"]
    first, second = (experiments.stored(each, 0, made)["inference_info"] for each in (lora, peft))
    assert first["measurement"] == second["measurement"]
    assert first.keys() >= {"machine", "created_at"}
    assert (first["seconds_per_step"], first["written_tokens_per_second"]) == (2.0, 30.0)


def test_rounds_are_in_turns(tmp_path, measured):
    """Forward and backward: a machine that grows slower favours no method."""
    begun, _ = measured
    made, both = recorded(tmp_path, "lora", "peft_lora")
    finished(made, "lora")
    made.small = False
    decoders.measure(both, made)
    assert begun == ["lora", "peft_lora", "peft_lora", "lora", "lora", "peft_lora"]


def test_methods_with_other_batches_are_not_compared(tmp_path, measured):
    measured[1]["peft_lora"] = "bb"
    made, both = recorded(tmp_path, "lora", "peft_lora")
    finished(made, "lora")
    with pytest.raises(InputError, match="tiny/e2e/peft_lora has other batches or prompts"):
        decoders.measure(both, made)
    assert not any("inference_info" in experiments.stored(each, 0, made) for each in both)


def test_run_without_its_folder_is_named_and_run_again_for_its_speed_only(tmp_path, measured, monkeypatch, capsys):
    begun, _ = measured
    made, both = recorded(tmp_path, "lora", "peft_lora")
    decoders.measure(both, made)
    assert not begun
    line = capsys.readouterr().err
    assert line.startswith("no speed of tiny/e2e: the folders of tiny_e2e_lora_seed0 are gone")
    assert line.count("\n") == 1
    again = []

    def finish(experiment, seed, options, *, folder):
        again.append((experiment.method, folder))
        return experiments.stored(experiment, seed, options)

    monkeypatch.setattr(decoders, "finish", finish)
    made.speed = True
    decoders.measure(both, made)
    assert again == [("lora", True)]
    assert begun == ["lora", "peft_lora"]


def test_record_without_its_folder_is_current(tmp_path, monkeypatch):
    """Only where the folder is asked for, the run is done again."""
    made, (lora,) = recorded(tmp_path, "lora", options=["--base=tiny=nowhere"])
    made.small = False
    read = {name: peer()["meta_info"][name] for name in ("model_info", "dataset_info")}
    monkeypatch.setattr(decoders, "inputs", lambda *_: read)
    begun = []

    def train(*_, **__):
        begun.append("lora")
        raise InterruptedError

    monkeypatch.setattr(decoders.runs, "train", train)
    assert decoders.finish(lora, 0, made)["folder"] == "lora_run"
    assert not begun
    with pytest.raises(InterruptedError):
        decoders.finish(lora, 0, made, folder=True)


def test_record_says_whether_an_earlier_process_began_the_run(tmp_path, monkeypatch):
    made, (lora,) = recorded(tmp_path, "lora", options=["--base=tiny=nowhere"])
    monkeypatch.setattr(decoders, "inputs", lambda *_: {})
    monkeypatch.setattr(decoders.runs, "train", lambda config, out, *_, **__: out.mkdir(parents=True))
    monkeypatch.setattr(records, "of_run", lambda out, config, **about: {"run_info": about, "meta_info": {}})
    assert decoders.finish(lora, 0, made)["run_info"]["resumed"] is False
    experiments.record(lora, 0, made).unlink()
    monkeypatch.setattr(decoders.runs, "train", lambda *_, **__: None)
    assert decoders.finish(lora, 0, made)["run_info"]["resumed"] is True


def test_rows_of_other_seeds_stand_in_a_table_of_their_own(tmp_path):
    """The mean of two seeds is not that of one, and each table names its seeds."""
    made, _ = recorded(tmp_path, "lora", "dsee")
    experiments.record(Experiment("tiny", "e2e", "lora"), 1, made).write_text(json.dumps(peer(1, "lora")))
    text = decoders.tabulate(made)
    places = [text.index(part) for part in ("**E2E, tiny**, seeds 0 and 1;", "| LoRA |", "tiny**, seed 0;", "| DSEE |")]
    assert places == sorted(places)


def speed(measurement, seconds=1.0, hour=1):
    """Return the measured speed of a record."""
    return {
        **{"measurement": measurement, "created_at": f"2026-01-01T{hour:02}:00:00+00:00", "machine": "a"},
        **{"seconds_per_step": seconds, "written_tokens_per_second": 7.0},
    }


def test_table_has_the_speeds_of_one_measurement(tmp_path):
    """Of most methods; of equally many, the newest. Those of another time are left out and named."""
    speeds = {"lora": speed("x", 1.5), "peft_lora": speed("x", 2.5), "dsee": speed("y", 3.5, 2)}
    for method, each in speeds.items():
        made, _ = recorded(tmp_path, method, inference_info=each)
    text = decoders.tabulate(made)
    assert "| 1.500 s | 7/s |" in text
    assert "| 2.500 s | 7/s |" in text
    assert "3.500 s" not in text
    assert "Measured at another time than the table, and left out: the speed of DSEE." in text
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["measured"]["measurement"] for row in rows] == ["x", "x", "y"]
    recorded(tmp_path, "lora", inference_info=speed("y", 4.5, 2))
    recorded(tmp_path, "peft_lora")
    assert "the speed of" not in decoders.tabulate(made)
    recorded(tmp_path, "lora", inference_info=speed("x", 1.5))
    assert "left out: the speed of LoRA." in decoders.tabulate(made)


def test_tokens_and_folders_belong_to_the_data_and_the_model(tmp_path, monkeypatch):
    """A changed data folder or model gives other names, and a record of the former ones is not current."""
    read = {"model_info": {"sha256": "m"}, "dataset_info": {"e2e": {"sha256": {"dev": "d"}}}}
    monkeypatch.setattr(decoders, "inputs", lambda *_: read)
    made, (peft,) = recorded(tmp_path, "peft_lora", options=["--base=tiny=nowhere"])
    stored = peer()
    stored["meta_info"] |= read
    # The tokens are not written.
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    names, current = set(), []
    for name, value in (("model_info", {"sha256": "m"}), ("model_info", {"sha256": "n"}), ("dataset_info", {})):
        read = read | {name: value}
        names.add(tuple(decoders.peer_command(peft, 0, made)[3:5]))
        current.append(experiments.unchanged(stored, stored["config"], read))
    assert len({tokens for tokens, _ in names}) == len({out for _, out in names}) == 3
    assert current == [True, False, False]


def prepared(folder, **more):
    """Return the setup of a run of a tiny decoder, three batches a pass."""
    if not (folder / "base").exists():
        tiny_decoders.write(folder / "base", **tiny_decoders.VARIANTS["llama"])
    return setup.prepare(runs.config(folder, **runs.causal_lm(folder, generate__new_tokens=0, **more)))


def test_steps_of_a_run_are_compiled_before_the_clock(tmp_path):
    """One program for each length, and none more: a state placed otherwise than that of a run compiles twice."""
    made, compiled = prepared(tmp_path, prune__kind="none"), []
    batches = decoder_speed.first_batches(made, 4)

    def count(event, seconds, fun_name="", **_):
        compiled.extend([event] if event.endswith("backend_compile_duration") and fun_name == "jit(step)" else [])

    jax.monitoring.register_event_duration_secs_listener(count)
    assert decoder_speed.step_seconds(made, batches) > 0
    jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == len({batch["input_ids"].shape for batch in batches})


def test_two_stages_and_one_are_timed_on_the_same_batches(tmp_path):
    """Also where the steps are more than the batches of the run."""
    digests = []
    for more in ({"train__epochs": 1, "train__retune_epochs": 1}, {"prune__kind": "none", "train__epochs": 2}):
        batches = decoder_speed.first_batches(prepared(tmp_path, **more), 8)
        named = [{short: batch[name] for short, name in decoder_tokens.NAMES.items()} for batch in batches]
        digests.append(timed_steps.digest(named, []))
    assert digests[0] == digests[1]


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Return a function that gives a new training of PEFT on six packed batches, and the folder of its tiny Llama."""
    torch = pytest.importorskip("torch")
    import tokenizers
    import transformers

    from benchmarks import peft_decoder

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=11, num_key_value_heads=1, **sizes))
    base.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(11)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    about = {
        **{"model": str(folder), "evaluations": [3, 6], "prompts": [[1, 2], [3]], "references": [["w1"], ["w2"]]},
        **{"ends": [0], "pad": 0, "batch_size": 2, "new_tokens": 3, "clip": 1.0, "weight_decay": 0.1},
    }
    sets = {
        "train": [batch(4, 3, padding=1), batch(5, 4)] * 3,
        "choose": [batch(4, 4)],
        "score": [batch(3, 5)],
        "held": [batch(6)],
    }
    arrays = {key: value for name, some in sets.items() for key, value in decoder_tokens.arrays(name, some).items()}
    rates = np.linspace(1, 0.1, 6, dtype=np.float32)
    np.savez(folder / "tokens.npz", rates=rates, about=np.array(json.dumps(about)), **arrays)

    def make(method="lora"):
        tokens = peft_decoder.Tokens(folder / "tokens.npz")
        return peft_decoder.Training(tokens, peft_decoder.adapter(method, 2, 4, 0), 0.05, 0)

    return make, folder


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_peft_reads_packed_batches_as_the_library_does(training):
    """The loss of packed texts, a padded batch among them, is that of the library for the same weights."""
    import dsee_jax
    from benchmarks import peft_decoder
    from dsee_jax.train.losses import cross_entropy

    make, folder = training
    tuned = make()
    model, params = dsee_jax.load_pretrained(folder, task="causal-lm")
    for number, made in enumerate([batch(4, 3, padding=1), batch(5, 4)]):
        total, count = peft_decoder.losses(tuned.model, tuned.tokens.batch("train", number))
        inputs = {
            **{name: made[name] for name in ("input_ids", "attention_mask")},
            "token_type_ids": made["labels"] * 0,
        }
        expected = (cross_entropy(dsee_jax.apply(model, params, None, inputs), made) * made["weights"]).sum()
        assert float(total) == pytest.approx(float(expected), rel=1e-5)
        assert float(count) == made["weights"].sum()


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_batches_of_a_peer_are_built_before_the_clock(training, monkeypatch):
    """The digest is that of the library's own batches and prompts, the eighth step begins again."""
    from benchmarks import peft_decoder

    tuned = training[0]()
    clock = timed_steps.median_seconds

    def no_more(*_):
        raise AssertionError("a batch is built within the clock")

    def timed(step, batches, lengths):
        with monkeypatch.context() as patch:
            patch.setattr(peft_decoder.Tokens, "batch", no_more)
            return clock(step, batches, lengths)

    monkeypatch.setattr(timed_steps, "median_seconds", timed)
    figures = peft_decoder.speed(tuned, 8, 2)
    assert figures["seconds_per_step"] > 0
    ours = [batch(4, 3, padding=1), batch(5, 4)] * 4
    named = [{short: each[name] for short, name in decoder_tokens.NAMES.items()} for each in ours]
    assert figures["digest"] == timed_steps.digest(named, [[1, 2], [3]])


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("method", ["lora", "rslora", "shira"])
def test_killed_peer_resumes_with_the_same_figures(training, tmp_path, monkeypatch, method):
    """Killed in the fifth step, after the state of the third: losses and scores are those of an undisturbed run."""
    from benchmarks import peft_decoder

    make, _ = training
    undisturbed, out = tmp_path / "whole", tmp_path / "killed"
    undisturbed.mkdir()
    out.mkdir()
    whole = peft_decoder.run(make(method), undisturbed)
    killed, step = make(method), peft_decoder.Training.step

    def die(self, number, batch):
        if number == 4:
            raise InterruptedError
        return step(self, number, batch)

    monkeypatch.setattr(peft_decoder.Training, "step", die)
    with pytest.raises(InterruptedError):
        peft_decoder.run(killed, out)
    steps: list[int] = []

    def counted(self, number, batch):
        steps.append(number)
        return step(self, number, batch)

    monkeypatch.setattr(peft_decoder.Training, "step", counted)
    again = peft_decoder.run(make(method), out)
    assert steps[0] == 3
    names = ("before", "losses", "evaluations", "choose", "final", "tokens", "trained_parameters")
    assert {name: again[name] for name in names} == {name: whole[name] for name in names}
    assert whole["losses"][4] < whole["losses"][0]  # of the same batch
    assert len((out / "texts.jsonl").read_text().splitlines()) == 2


@pytest.mark.exhaustive
def test_command_compares_both_sides_and_does_nothing_twice(tmp_path, shared):
    """A real Llama of 260 thousand parameters; both sides start at the same loss, and the second call changes no record."""
    pytest.importorskip("torch")
    command = [
        *(sys.executable, "-m", "benchmarks.decoders", "--small", "--seeds", "0", f"--data={shared / 'data'}"),
        *(f"--base=stories={shared / 'data' / 'stories260k'}", f"--runs={tmp_path / 'runs'}"),
        *("--only", "stories/e2e/lora", "stories/e2e/peft_lora", "stories/e2e/cut_75"),
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    results = tmp_path / "runs" / "results"
    made = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert {*made} == {f"stories_e2e_{method}_seed0" for method in ("lora", "peft_lora", "cut_75")}
    ours, theirs = (made[f"stories_e2e_{method}_seed0"]["train_info"] for method in ("lora", "peft_lora"))
    for name in ("loss", "loss_held"):
        assert theirs["before"][name] == pytest.approx(ours["before"][name], rel=1e-4)
    assert theirs["num_trainable_params"] == ours["num_trainable_params"]
    assert all(each["inference_info"]["written_tokens_per_second"] > 0 for each in made.values())
    assert len({each["inference_info"]["measurement"] for each in made.values()}) == 1
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    subprocess.run(command, check=True, cwd=ROOT)
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
