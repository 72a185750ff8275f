"""Runs of causal-lm: every stage over two families, packed and unpacked alike, resumed, and what is asked of the input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import decoders
import runs
from dsee_jax import __main__ as command
from dsee_jax import completion, finished, loop, setup, step, training
from dsee_jax.data.batches import Batches

pytest.importorskip("sacrebleu", reason="needs sacrebleu (extra `text`)")

STRUCTURED = {"prune__kind": "structured", "prune__heads": 1, "prune__neurons": 0.25, "prune__scope": "tensor"}
PRUNINGS = {
    "unstructured": {"prune__sparsity": 0.5},
    "structured": STRUCTURED,
    "earlybert": STRUCTURED | {"prune__kind": "earlybert", "prune__search": 0.7},
}


def base(folder, family="llama"):
    return decoders.write(folder / "base", tie_word_embeddings=True, eos_token_id=9, **decoders.VARIANTS[family])


def config(folder, **overrides):
    """Two steps a stage."""
    if not (folder / "base").exists():
        base(folder)
    short = {"train__epochs": 0.6, "train__retune_epochs": 0.6}
    return runs.config(folder, **runs.writing(folder, **(short | overrides)))


@pytest.mark.parametrize(
    ("family", "pruning"), [("llama", "unstructured"), ("gpt2", "structured"), ("llama", "earlybert")]
)
def test_a_run(tmp_path, family, pruning):
    """Every stage is scored, the verbs give the same again, and what was cut out is gone."""
    base(tmp_path, family)
    chosen = config(tmp_path, **PRUNINGS[pruning])
    results = loop.run(chosen, say=lambda text: None)
    assert list(results["final"]) == ["bleu", "nist", "rouge_l", "loss", "perplexity"]
    for stage in [{"metrics": results["before"]}, *results["stages"]]:
        assert list(stage["metrics"]) == list(results["final"])
        assert stage["metrics"]["perplexity"] == pytest.approx(np.exp(stage["metrics"]["loss"]))
    assert results["task"] == "tiny"
    assert results["head_parameters"] == 0
    assert results["weight_sparsity"] > 0.2
    run = tmp_path / "run"
    again = finished.evaluate(run)
    assert list(again) == list(results["final"])
    assert again == pytest.approx(results["final"], rel=1e-5)
    finished.export(run, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [
        {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}[family]
    ]
    texts = [
        completion.complete(completion.opened(tmp_path / name), ["the cat a"], new_tokens=4) for name in ("run", "hf")
    ]
    assert texts[0] == texts[1]
    assert command.main(["report", str(run)]) == 0


def test_it_learns(tmp_path):
    """To say three words again, the last first."""
    chosen = config(tmp_path, train__full=True, delta__rank=0, delta__nonzeros=0, prune__kind="none", train__epochs=25)
    results = loop.run(chosen, say=lambda text: None)
    assert results["final"]["loss"] < results["before"]["loss"] / 2
    assert results["final"]["rouge_l"] > results["before"]["rouge_l"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The setups of one run, with a text a row and packed."""
    folder = tmp_path_factory.mktemp("packed")
    return [setup.prepare(config(folder, data__packing=packing, data__max_length=30)) for packing in (False, True)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_and_unpacked_texts_have_equal_losses_and_gradients(tmp_path, family):
    """The whole training set as one batch: many rows of one text, or few rows of several."""
    base(tmp_path, family)
    found = []
    for packing in (False, True):
        made = setup.prepare(config(tmp_path, data__packing=packing, data__max_length=30, train__dropout=0.0))
        data, size = made.data.train, made.data.train.size
        batch = Batches(data, size, 1.0, 0, made.data.edges)[0]
        assert (batch["attention_mask"].max() > 1) == packing
        frozen = step.Frozen(made.params, made.supports, {})
        moved = jax.tree.map(lambda leaf: leaf + 0.1, made.trained["deltas"])

        def loss(deltas, made=made, frozen=frozen, batch=batch):
            logits = step.predict(
                made.model, {"deltas": deltas, "params": {}}, frozen, batch, made.config.delta, deterministic=True
            )
            losses = step.losses(logits, batch["labels"], regression=False)
            return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])

        found.append((size, batch["weights"].sum(), *jax.jit(jax.value_and_grad(loss))(moved)))
    (rows, tokens, single, gradient), (fewer, same, packed, other) = found
    assert fewer < rows / 2
    assert same == tokens
    assert float(packed) == pytest.approx(float(single), rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), other, gradient)


def test_packed_and_unpacked_dev_sets_have_equal_scores(prepared):
    scores = []
    for made in prepared:
        compiled = training.programs(made)
        scores.append(compiled.write(made.trained, {}) | compiled.evaluate(made.trained, {}))
    assert prepared[1].data.dev["dev"].size < prepared[0].data.dev["dev"].size
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_the_exercise_of_a_dev_set(prepared):
    """Each prompt once, with all its references, as the files have them."""
    for made in prepared:
        exercise = made.data.exercise
        assert exercise is not None
        assert len(exercise.prompts) == len({tuple(prompt) for prompt in exercise.prompts})
        assert sum(map(len, exercise.references)) == 12
        assert all(len(some) == 2 * len(set(some)) / 2 or len(some) % 2 == 0 for some in exercise.references)


class Crash(Exception):
    pass


def test_a_crash_in_the_middle_of_an_epoch_changes_nothing(tmp_path, monkeypatch):
    """Packed rows, and texts scored at the ends of stages: the same figures as without the crash."""
    base(tmp_path)
    options = {"data__packing": True, "data__max_length": 30, "train__batch_size": 2, "train__checkpoint_every": 1}
    whole = config(tmp_path, output_dir=str(tmp_path / "whole"), **options)
    expected = loop.run(whole, say=lambda text: None)
    other = config(tmp_path, output_dir=str(tmp_path / "other"), **options)
    real, steps = training.sharding.split, []

    def split(mesh, batch):
        steps.append(batch)
        if len(steps) == 3:
            raise Crash
        return real(mesh, batch)

    monkeypatch.setattr(training.sharding, "split", lambda mesh, batch: real(mesh, batch))
    monkeypatch.setattr(
        training, "sharding", type("S", (), {"split": staticmethod(split), "copy": training.sharding.copy})
    )
    with pytest.raises(Crash):
        loop.run(other, say=lambda text: None)
    monkeypatch.undo()
    found = loop.run(other, say=lambda text: None)
    assert found["stages"] == expected["stages"]
    assert found["final"] == expected["final"]
