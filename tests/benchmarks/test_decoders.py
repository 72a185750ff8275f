"""The comparison of decoders: its configs, its data, its peers' records, and PEFT on the library's own batches."""

import functools
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import decoder_data, decoder_tokens, decoders, experiments, records
from benchmarks.experiments import Experiment
from benchmarks.runs import ROOT
from dsee_jax.errors import InputError


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


def peer(seed=0):
    """Return the record of a made-up run of PEFT."""
    about = experiments.labels(Experiment("tiny", "e2e", "peft_lora"), seed, "loss", 11.0)
    return records.of_peer(FIGURES, {"bleu": 40.0}, config("peft_lora"), **about) | {"config": config("peft_lora")}


def test_record_of_a_peer_has_the_figures_of_a_row(tmp_path):
    """Perplexities follow the losses, forgetting is the rise on the held text; the table shows them."""
    made = peer()
    last = made["train_info"]["metrics"][-1]
    assert (last["valid loss"], last["test loss"], last["test bleu"], last["forgetting"]) == (1.25, 1.5, 40.0, 0.25)
    assert last["test perplexity"] == pytest.approx(math.exp(1.5))
    assert records.score(made, "test") == 150
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tiny_e2e_peft_lora_seed0.json").write_text(json.dumps(made))
    text = decoders.tabulate(options(tmp_path, f"--results={tmp_path / 'results'}"))
    assert "**E2E, tiny**; before tuning: loss 2.500, loss of the held text 3.000" in text
    row = "| LoRA of PEFT | 1.500 | 4.48 | 40.0 | +0.250 | 5.00% | 0% |  | 0.0 MB | 0.00 GB |  |  |"
    assert row in text


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

    def die(self, number):
        if number == 4:
            raise InterruptedError
        return step(self, number)

    monkeypatch.setattr(peft_decoder.Training, "step", die)
    with pytest.raises(InterruptedError):
        peft_decoder.run(killed, out)
    steps: list[int] = []

    def recorded(self, number):
        steps.append(number)
        return step(self, number)

    monkeypatch.setattr(peft_decoder.Training, "step", recorded)
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
    before = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    subprocess.run(command, check=True, cwd=ROOT)
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
