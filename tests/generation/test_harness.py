"""A decoder as a model of lm-evaluation-harness, against the harness's own model for Hugging Face folders."""

import json

import numpy as np
import pytest

import decoders
from dsee_jax.errors import InputError
from dsee_jax.generation import harness

PAIRS = [
    ("the cat sees a", " dog"),
    ("", "some birds run"),
    ("no dog ", "sees all red birds"),
    ("the cat", " sees the dog and the bird"),
    ("the cat", " sees no dog"),
    ("a dog sees the cat " * 9, " bird"),
]
"""Contexts and continuations: empty, with a space at the end, shared, longer than the model's positions."""


@pytest.mark.skipif(harness._PACKAGE is not None, reason="lm_eval is installed")
def test_a_missing_package_is_one_line():
    with pytest.raises(InputError, match=r"HarnessLM needs lm_eval: pip install 'dsee-jax\[lm-eval\]'"):
        harness.HarnessLM("a")


def test_options_of_a_task_become_those_of_generation():
    assert harness._options({"do_sample": False, "temperature": 0.0, "top_p": 0.9}) == {"temperature": 0.0, "beams": 1}
    assert harness._options({"do_sample": True, "temperature": 0.0}) == {"temperature": 0.0, "beams": 1}
    sampled = {"temperature": 0.5, "top_k": 0, "top_p": 0.9, "beams": 1}
    assert harness._options({"do_sample": True, "temperature": 0.5, "top_p": 0.9}) == sampled
    with pytest.raises(InputError, match=r"asks for min_p, and generation has do_sample, num_beams, temperature"):
        harness._options({"do_sample": True, "min_p": 0.1})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny decoder here and in the harness's own model."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    folder = decoders.write(tmp_path_factory.mktemp("models") / "a", eos_token_id=3)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "[SEP]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return harness.HarnessLM(folder, batch_size=4), theirs


def instances(kind, rows):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, row, number) for number, row in enumerate(rows)]


@pytest.mark.parity
def test_log_likelihoods_equal_those_of_the_harness(models):
    (ours, exact), (theirs, expected) = (
        zip(*model.loglikelihood(instances("loglikelihood", PAIRS)), strict=True) for model in models
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert exact == expected


@pytest.mark.parity
def test_the_most_probable_token_alone_is_greedy(models):
    size = models[0].writer.model.config.vocab_size
    rows = [(None, [7, 8, 9], [token]) for token in range(size)]
    (ours, exact), (_, expected) = (
        zip(*model._loglikelihood_tokens(rows, disable_tqdm=True), strict=True) for model in models
    )
    assert exact == expected
    assert [token for token in range(size) if exact[token]] == [np.argmax(ours)]
    np.testing.assert_allclose(np.sum(np.exp(ours)), 1, rtol=1e-5)


@pytest.mark.parity
def test_long_texts_are_scored_in_the_windows_of_the_harness(models):
    rows = [("the cat sees a dog",), ("some birds see no cat and all dogs run " * 8,)]
    ours, theirs = (model.loglikelihood_rolling(instances("loglikelihood_rolling", rows)) for model in models)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parity
def test_texts_end_at_the_stop_sequences_of_the_task(models):
    """The batch has two sets of options, and a context longer than the positions that the new tokens leave."""
    free, long = ({"until": ["[SEP]"], "max_gen_toks": count, "do_sample": False} for count in (8, 12))
    rows = [("the cat sees", free), ("no dog", long), ("a dog sees the cat " * 9, free)]
    texts = models[0].generate_until(instances("generate_until", rows))
    assert [text.strip() for text in texts] == [
        text.strip() for text in models[1].generate_until(instances("generate_until", rows))
    ]
    word = texts[0].split()[2]
    cut = models[0].generate_until(
        instances("generate_until", [("the cat sees", {"until": [word], "max_gen_toks": 8})])
    )
    assert cut == [texts[0].split(word)[0]]


@pytest.mark.parity
@pytest.mark.exhaustive
def test_a_task_has_the_scores_of_the_harness(models, tmp_path, monkeypatch):
    """A task of multiple choice on a local file, through the harness itself."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval

    words = ["cat", "dog", "bird"]
    rows = [{"text": f"{who} {a} sees the", "label": n % 3} for who in ("a", "the", "no") for n, a in enumerate(words)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "animals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": words,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    ours, theirs = (
        lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0, verbosity="ERROR")["results"]["animals"]
        for model in models
    )
    assert {name: ours[name] for name in theirs} == theirs
    assert ours["acc,none"] > 0
