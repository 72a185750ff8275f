"""Runs of causal-lm: every stage of two families, packing, resuming, and errors of the input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import runs
import train
from dsee_jax import __main__ as command
from dsee_jax import stacks
from dsee_jax.analysis import statistics
from dsee_jax.ckpt import adapter
from dsee_jax.data.batches import Batches
from dsee_jax.errors import InputError
from dsee_jax.export.run import export_run
from dsee_jax.generation import pipeline
from dsee_jax.metrics import text
from dsee_jax.runtime import files
from dsee_jax.train import finished_run, loop, programs, pruning, setup, step
from dsee_jax.train.losses import cross_entropy

pytest.importorskip("sacrebleu", reason="needs sacrebleu (extra `text`)")

STRUCTURED = {"prune__kind": "structured", "prune__heads": 1, "prune__neurons": 0.25, "prune__scope": "tensor"}
PRUNINGS = {
    "unstructured": {"prune__sparsity": 0.5},
    "sparsegpt": {
        "prune__score": "SPARSEGPT",
        "prune__calibrate": "layerwise",
        "model__scan": True,
        "model__remat": True,
    },
    "structured": STRUCTURED,
    "earlybert": STRUCTURED | {"prune__kind": "earlybert", "prune__search": 0.7},
}


def base(folder, family="llama"):
    return decoders.write(folder / "base", tie_word_embeddings=True, eos_token_id=9, **decoders.VARIANTS[family])


def config(folder, **overrides):
    """A config with two steps per stage."""
    if not (folder / "base").exists():
        base(folder)
    short = {"train__epochs": 0.6, "train__retune_epochs": 0.6}
    return runs.config(folder, **runs.causal_lm(folder, **(short | overrides)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["structured", pytest.param("earlybert", marks=pytest.mark.exhaustive)])
def test_run_whose_cut_removes_all_that_it_trains_ends_with_the_cut_model(tmp_path, kind):
    """A decoder has no head, and all updates are in the neurons; an interrupted call resumes to the same end."""
    fields = json.loads((base(tmp_path) / "config.json").read_text())
    neurons = fields["num_hidden_layers"] * fields["intermediate_size"]
    options = {"prune__kind": kind, "prune__neurons": neurons, "prune__search": 0.7, "generate__new_tokens": 0}
    made, said = config(tmp_path, **options, delta__targets=[".*/mlp/up/kernel"]), []
    results = loop.run(made, say=said.append)
    last = results["stages"][-1]
    assert last["name"] == ("prune" if kind == "structured" else "draw")
    assert results["final"] == last["metrics"]
    out = tmp_path / "run"
    assert finished_run.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    export_run(out, tmp_path / "exported")
    (out / "metrics.json").unlink()
    assert loop.run(made, say=said.append)["final"] == results["final"]
    assert sum("skipped" in str(line) for line in said) == 2


@pytest.mark.parametrize(
    ("family", "pruning"),
    [
        pytest.param("llama", "unstructured", marks=pytest.mark.smoke),
        pytest.param("llama", "sparsegpt", marks=pytest.mark.exhaustive),
        pytest.param("gpt2", "structured", marks=pytest.mark.exhaustive),
        pytest.param("llama", "earlybert", marks=pytest.mark.exhaustive),
    ],
)
def test_run_of_a_decoder(tmp_path, family, pruning):
    """Every stage has metrics, the verbs reproduce them, and pruned weights are gone."""
    base(tmp_path, family)
    chosen = config(tmp_path, **PRUNINGS[pruning])
    results = loop.run(chosen, say=lambda text: None)
    assert list(results["final"]) == ["bleu", "nist", "rouge_l", "exact_match", "loss", "perplexity"]
    for stage in [{"metrics": results["before"]}, *results["stages"]]:
        assert list(stage["metrics"]) == list(results["final"])
        assert stage["metrics"]["perplexity"] == pytest.approx(np.exp(stage["metrics"]["loss"]))
    assert results["task"] == "tiny"
    assert results["head_parameters"] == 0
    assert results["weight_sparsity"] > 0.2
    run = tmp_path / "run"
    again = finished_run.evaluate(run)
    assert list(again) == list(results["final"])
    assert again == pytest.approx(results["final"], rel=1e-5)
    export_run(run, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [
        {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    ]
    texts = [pipeline.complete(pipeline.load(tmp_path / name), ["the cat a"], new_tokens=4) for name in ("run", "hf")]
    assert texts[0] == texts[1]
    assert command.main(["report", str(run)]) == 0


def test_start_from_an_adapter_with_scanned_layers(tmp_path):
    """Files have one subtree per layer; a run with scanned layers stacks the updates that it starts from."""
    short = {"generate__new_tokens": 0, "prune__kind": "none", "train__epochs": 0.2}
    loop.run(config(tmp_path, **short), say=lambda text: None)
    places = {"model__path": str(tmp_path / "run/model"), "delta__start": str(tmp_path / "run/adapter")}
    on = config(tmp_path, model__scan=True, output_dir=str(tmp_path / "on"), **places, **short)
    begun, kept = setup.prepare(on), adapter.load(tmp_path / "run/adapter")
    start = {"deltas": begun.trained["deltas"], "supports": begun.supports}
    expected = {"deltas": kept.deltas, "supports": kept.supports}
    jax.tree.map(np.testing.assert_array_equal, stacks.unstack(start), expected)


@pytest.mark.slow
def test_training_lowers_the_loss_and_raises_rouge(tmp_path):
    """The task: repeat three words in reverse order."""
    chosen = config(tmp_path, train__full=True, delta__rank=0, delta__nonzeros=0, prune__kind="none", train__epochs=25)
    results = loop.run(chosen, say=lambda text: None)
    assert results["final"]["loss"] < results["before"]["loss"] / 2
    assert results["final"]["rouge_l"] > results["before"]["rouge_l"]
    for stage, metrics in (("before", "before"), ("tune", "final")):
        lines = (tmp_path / "run" / f"texts_{stage}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        again = text.score([record["text"] for record in records], [record["references"] for record in records])
        assert again["rouge_l"] == results[metrics]["rouge_l"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two setups of one run: one text per row, and packed rows."""
    folder = tmp_path_factory.mktemp("packed")
    return [setup.prepare(config(folder, data__packing=packing, data__max_length=30)) for packing in (False, True)]


def loss_and_gradient(made, batch):
    """The mean loss over response tokens, and its gradient with respect to updates that are not 0."""
    frozen = step.Frozen(made.params, made.supports, {})
    moved = jax.tree.map(lambda leaf: leaf + 0.1, made.trained["deltas"])

    def loss(deltas):
        logits = step.predict(
            made.model, {"deltas": deltas, "params": {}}, frozen, batch, made.config.delta, deterministic=True
        )
        losses = cross_entropy(logits, batch)
        return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

    return jax.jit(jax.value_and_grad(loss))(moved)


@pytest.mark.parametrize(
    "family",
    [
        "gpt2",
        pytest.param("qwen3, biases and windows", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("llama", "mistral", "qwen2, windows above")),
    ],
)
def test_packed_and_unpacked_texts_have_equal_losses_and_gradients(tmp_path, family):
    """The complete training set is one batch: many rows of one text, or few rows of several texts."""
    base(tmp_path, family)
    results = []
    for packing in (False, True):
        made = setup.prepare(config(tmp_path, data__packing=packing, data__max_length=30, train__dropout=0.0))
        data, size = made.data.train, made.data.train.size
        batch = Batches(data, size, 1.0, 0, made.data.edges)[0]
        assert (batch["attention_mask"].max() > 1) == packing
        results.append((size, batch["weights"].sum(), *loss_and_gradient(made, batch)))
    (rows, tokens, single, gradient), (fewer, same, packed, other) = results
    assert fewer <= rows / 2
    assert same == tokens
    assert float(packed) == pytest.approx(float(single), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), other, gradient)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("qwen3", "gpt2"))]
)
def test_training_in_bfloat16_is_close(tmp_path, family):
    """bfloat16 has a relative rounding error of 2 ** -8 per operation, over a few dozen operations."""
    base(tmp_path, family)
    results = []
    for dtype in ("float32", "bfloat16"):
        made = setup.prepare(config(tmp_path, model__dtype=dtype, model__param_dtype=dtype, train__dropout=0.0))
        batch = Batches(made.data.train, made.data.train.size, 1.0, 0, made.data.edges)[0]
        loss, gradient = loss_and_gradient(made, batch)
        results.append((float(loss), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])))
        assert results[-1][1].dtype == np.float32
    (loss, gradient), (rough, other) = results
    assert rough == pytest.approx(loss, rel=8 * 2**-8)
    assert np.linalg.norm(other - gradient) < 32 * 2**-8 * np.linalg.norm(gradient)


def test_packed_and_unpacked_dev_sets_have_equal_scores(prepared):
    scores = []
    for made in prepared:
        compiled = programs.make_programs(made)
        frozen = pruning.freeze(made, {})
        scores.append(compiled.write(made.trained, frozen).metrics | compiled.evaluate(made.trained, frozen))
    assert prepared[1].data.dev["dev"].size < prepared[0].data.dev["dev"].size
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_references_have_every_prompt_once(prepared):
    """Each prompt of the dev set once, with all its references."""
    for made in prepared:
        references = made.data.references
        assert references is not None
        assert len(references.prompts) == len({tuple(prompt) for prompt in references.prompts})
        assert sum(map(len, references.texts)) == 12
        ids = made.data.references.tokenizer.decode(references.prompts[0], skip_special_tokens=True).split()
        assert references.texts[0] == [" ".join(ids[::-1]), ids[-1]]


class Death(Exception):
    """The death of a process."""


@pytest.mark.slow
def test_killed_run_resumes_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    """With packed rows and generated texts: the figures are those of an uninterrupted run."""
    base(tmp_path)
    options = {"data__packing": True, "data__max_length": 30, "train__batch_size": 2, "train__checkpoint_every": 1}
    options |= {"train__epochs": 1.0, "train__eval_every": 2}
    expected = loop.run(config(tmp_path, **options), say=lambda text: None)
    again, append = config(tmp_path, output_dir=str(tmp_path / "again"), **options), files.append

    def dying(path, record):
        append(path, record)
        if (record["stage"], record["step"]) == ("tune", 3):
            raise Death

    monkeypatch.setattr(files, "append", dying)
    with pytest.raises(Death):
        loop.run(again, say=lambda text: None)
    monkeypatch.undo()
    assert loop.run(again, say=lambda text: None)["stages"] == expected["stages"]
    assert runs.figures(tmp_path / "again") == runs.figures(tmp_path / "run")


def test_statistics_and_stablehlo_of_a_decoder_run(tmp_path):
    """Gram matrices of every kernel, and a program that returns the logits of every word."""
    options = {"prune__kind": "none", "generate__new_tokens": 0, "data__packing": True, "data__max_length": 30}
    results = loop.run(config(tmp_path, **options), say=lambda text: None)
    assert list(results["final"]) == ["loss", "perplexity"]
    run = tmp_path / "run"
    arrays, about = statistics.collect(run, "gram", examples=8)
    assert about == {"kind": "gram", "examples": "8", "task": "tiny"}
    assert arrays["model.layers.1.mlp.down_proj.weight"].shape == (40, 40)
    with pytest.raises(InputError, match="one label, and the task of the run is causal-lm: use --kind gram"):
        statistics.collect(run, "fisher", examples=0)
    export_run(run, tmp_path / "program", form="stablehlo")
    said = json.loads((tmp_path / "program" / "signature.json").read_text())["output"]
    assert said == {
        "dtype": "float32",
        "shape": ["batch", "length", 37],
        "what": "logits of the next token",
    }


BAD = {
    "a prompt that fills the context": (
        {"prompt": " ".join(["cat"] * 30), "completion": "dog"},
        {"data__max_length": 32},
        "train.jsonl:25: the prompt has 32 tokens and leaves no room for a response: data.max_length is 32",
    ),
    "an empty completion": (
        {"prompt": "cat", "completion": ""},
        {},
        "train.jsonl:25: the completion is empty",
    ),
    "a line that is not JSON": ("{'prompt'", {}, "train.jsonl:25: not JSON: "),
    "a chat without a template": (
        {"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "dog"}]},
        {},
        "train.jsonl:25: messages need a chat template and the tokenizer has none",
    ),
    "no room to write": (
        None,
        {"generate__new_tokens": 31},
        "generate.new_tokens is 31; with a prompt of 5 tokens this is more than the model's 32 positions",
    ),
    "longer than the positions": (None, {"data__max_length": 33}, "data.max_length is 33; "),
    "nothing to train": (
        None,
        {"delta__rank": 0, "delta__nonzeros": 0, "prune__score": "W"},
        "no parameter is trained: ",
    ),
    "a source without prompts": (
        None,
        {"data__source": "toy"},
        "data.source 'toy', which is for sequence-classification: set data.source to one of csv, jsonl, e2e",
    ),
    "packing for a classifier": (
        None,
        {"model__task": "sequence-classification", "data__packing": True},
        "data.packing is",
    ),
    "a new head of a decoder": (None, {"model__new_head": True}, "model.new_head is True; expected false"),
    "no such search": (None, {"generate__beams": 0}, "generate.beams is 0; expected 1 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, name):
    line, options, message = BAD[name]
    base(tmp_path)
    arguments = runs.arguments(tmp_path, **runs.causal_lm(tmp_path, **options))
    if line:
        with (tmp_path / "prompts" / "train.jsonl").open("a") as file:
            file.write(line if isinstance(line, str) else json.dumps(line))
    assert train.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert message in said.err
    assert not (tmp_path / "run").exists()
