"""Runs whose dev set is divided: one half chooses the best step, the other scores the model that was chosen."""

import json

import numpy as np
import pytest

import decoders
import runs
from dsee_jax.data.batches import assemble
from dsee_jax.runtime import files
from dsee_jax.train import evaluation, finished_run, report, setup


@pytest.mark.slow
def test_run_is_scored_on_the_half_that_chose_nothing(tmp_path, monkeypatch):
    calls = []
    evaluator = evaluation.evaluator

    def watched(*args):
        evaluate = evaluator(*args)

        def counted(*args, final=False):
            calls.append(final)
            return evaluate(*args, final=final)

        return counted

    monkeypatch.setattr(evaluation, "evaluator", watched)
    results, out = runs.run(tmp_path, data__split_dev=True, train__eval_every=2, delta__budget=0.05)
    # Before, prune, and the best of the five evaluations of tune and of retune.
    assert calls.count(True) == 4
    assert calls.count(False) == 2 + 5 + 5
    assert results["dev_examples"] == {"dev": {"choose": 10, "score": 10}}
    tune, prune, retune = results["stages"]
    assert set(tune) == {"name", "metrics", "choose", "best_step", "steps", "evaluations", "last"}
    assert set(prune) == {"name", "metrics", "choose"}
    log = [
        record for record in files.read(out / "metrics.jsonl") if record["stage"] == "retune" and "metrics" in record
    ]
    best = next(record for record in log if record["step"] == retune["best_step"])
    assert retune["choose"] == results["choose"] == best["metrics"]
    assert retune["choose"]["accuracy"] == max(record["metrics"]["accuracy"] for record in log)
    assert results["final"] == retune["metrics"] != retune["choose"]
    # The rank is that of the budget: one more is 2 * (24 + 24) entries.
    assert 0.05 * results["backbone_parameters"] - 96 < results["trainable_parameters"]
    assert results["trainable_fraction"] <= 0.05
    assert results["trainable_parameters"] == results["rank"] * 96 + 10
    again = finished_run.evaluate(out)
    assert again == pytest.approx(results["final"], rel=1e-5)
    whole = finished_run.evaluate(out, ["data.split_dev=false"])
    assert whole["accuracy"] == pytest.approx((results["final"]["accuracy"] + results["choose"]["accuracy"]) / 2)
    assert "## Scores on the test half of the dev set (10 examples)" in (out / "model/README.md").read_text()
    (shown, _), rows = report.tables(json.loads((out / "metrics.json").read_text())), report.rows(results)
    assert "on the test half of the dev set (10 examples)" in str(shown.title)
    assert shown.row_count == len(rows) + 4


@pytest.mark.slow
def test_texts_are_written_for_the_prompts_of_the_half_that_scores(tmp_path):
    decoders.write(tmp_path / "base", tie_word_embeddings=True, eos_token_id=9)
    data = setup.prepare(runs.config(tmp_path, **runs.causal_lm(tmp_path, data__split_dev=True))).data
    wanted = {tuple(prompt) for prompt in data.references.prompts}
    assert len(wanted) == 3

    def begins(tokens):
        batch = assemble(tokens, np.arange(tokens.size), data.edges)
        return {tuple(row[:size]) for row in batch["input_ids"].tolist() for size in map(len, wanted)} & wanted

    assert begins(data.scoring["dev"]) == wanted
    assert not begins(data.dev["dev"])
