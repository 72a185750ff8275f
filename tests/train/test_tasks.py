"""Runs of the tasks besides single labels and texts: from the files of the data to those of an export."""

import json

import numpy as np
import pytest

import decoders
import dsee_jax
import runs
import tiny
from dsee_jax.data import Questions, TaggedWords, Task
from dsee_jax.data.tokens import Tokens, Windows
from dsee_jax.export.run import export_run
from dsee_jax.train import finished_run
from dsee_jax.train.problems import PROBLEMS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT and transformers

SHORT = {"prune__kind": "none", "train__epochs": 1, "delta__nonzeros": 0}


def lines(folder, **splits):
    """Write ``SPLIT.jsonl`` files and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def check(results, out, names, problem_type=None):
    """The run and its files have the metrics, and an evaluation gives them again."""
    assert list(results["final"]) == list(results["before"]) == names
    assert finished_run.evaluate(out) == pytest.approx(results["final"], rel=1e-5)
    export_run(out, out.parent / "hf")
    config = json.loads((out.parent / "hf/config.json").read_text())
    assert config.get("problem_type") == problem_type
    card = (out.parent / "hf/README.md").read_text()
    assert all(name in card for name in names)
    same_in_transformers(out, config["architectures"][0])
    return config


def same_in_transformers(out, class_name):
    """The export, and the PEFT adapter on its base, give the logits of the run."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers, peft = (pytest.importorskip(name, reason=f"needs {name}") for name in ("transformers", "peft"))
    finished = finished_run.load(out)
    # PEFT 0.21 drops the token types of questions.
    batch = tiny.batch(padded=False, types=0)
    expected = np.asarray(dsee_jax.apply(finished.model, finished_run.plain_params(finished), None, batch))
    inputs = {name: torch.from_numpy(ids).long() for name, ids in batch.items() if name != "token_type_ids"}
    export_run(out, out.parent / "peft", form="peft")
    opened = getattr(transformers, class_name)
    base = opened.from_pretrained(out.parent / "base", num_labels=finished.task.num_labels)
    for model in (opened.from_pretrained(out.parent / "hf"), peft.PeftModel.from_pretrained(base, out.parent / "peft")):
        with torch.no_grad():
            outputs = model.eval()(**inputs)
        both = [getattr(outputs, name).numpy() for name in ("start_logits", "end_logits") if name in outputs]
        np.testing.assert_allclose(np.stack(both, -1) if both else outputs.logits.numpy(), expected, atol=1e-5)


@pytest.mark.parity
def test_run_of_texts_with_any_number_of_labels(tmp_path):
    """The words of a text are its labels: a few passes learn them."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        names = [name for name in ("cat", "dog", "bird") if generator.integers(2)]
        rows.append({"text": " ".join(["the", *names, "runs"]), "label": names})
    data = lines(tmp_path / "labels", train=rows, dev=rows[:20])
    options = {"data__dir": data, "data__source": "jsonl", "data__multi_label": True, "train__epochs": 6}
    results, out = runs.run(tmp_path, **SHORT | options, train__learning_rate=3e-2)
    config = check(results, out, ["f1_micro", "f1_macro", "subset_accuracy", "loss"], "multi_label_classification")
    assert config["id2label"] == {"0": "bird", "1": "cat", "2": "dog"}
    assert results["final"]["f1_micro"] > max(results["before"]["f1_micro"], 0.6)
    assert results["final"]["loss"] < results["before"]["loss"]
    model, params = dsee_jax.load_pretrained(tmp_path / "hf", num_labels=3)
    assert dsee_jax.apply(model, params, None, tiny.batch(rows=2)).shape == (2, 3)


def test_tags_are_scored_at_first_tokens_alone():
    """Two texts in rows of four tokens: the tags of other tokens and of padding are wrong and do not count."""
    examples = TaggedWords([["a", "b"], ["c"]], [[0, 1], [1]], ["x:1", "x:2"])
    task = Task("tiny", ("B-A", "O"), examples, {"dev": examples})
    weights = np.array([1, 0, 1, 1, 0], np.float32)
    tokens = Tokens(np.zeros(5, int), np.zeros(5, int), np.array([0, 3, 5]), np.array([0, 0, 1, 1, 0]), 0, weights)
    found = [np.array([[0, 1.0], [1, 9], [1, 2], [0, 9]]), np.array([[0, 3.0], [1, 9], [0, 9], [0, 9]])]
    scores = PROBLEMS["token-classification"].score(task, examples, tokens, found)
    assert scores == pytest.approx({"f1": 2 / 3, "precision": 1 / 2, "recall": 1, "accuracy": 2 / 3, "loss": 2})
    found[1][0, 1] = np.nan
    assert all(map(np.isnan, PROBLEMS["token-classification"].score(task, examples, tokens, found).values()))


@pytest.mark.parity
def test_run_of_tagged_words(tmp_path):
    """An animal is an entity: a few passes learn it, and transformers' fields name the tags."""
    generator = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        words = generator.choice(["the", "cat", "dog", "runs", "abc"], 5).tolist()
        rows.append({"tokens": words, "tags": ["B-ANIMAL" if word in ("cat", "dog") else "O" for word in words]})
    data = lines(tmp_path / "tags", train=rows, dev=rows[:20])
    options = {"data__dir": data, "data__source": "jsonl", "model__task": "token-classification", "train__epochs": 4}
    results, out = runs.run(tmp_path, **SHORT | options, train__learning_rate=3e-2)
    config = check(results, out, ["f1", "precision", "recall", "accuracy", "loss"])
    assert config["id2label"] == {"0": "B-ANIMAL", "1": "O"}
    assert config["architectures"] == ["BertForTokenClassification"]
    assert results["final"]["f1"] > max(results["before"]["f1"], 0.6)
    assert 'pipeline("token-classification"' in (tmp_path / "hf/README.md").read_text()


def test_best_answer_is_chosen_over_all_windows_of_a_text():
    """Of two windows the second is surer; tokens of the question and padding are no answer, however sure."""
    examples = Questions(["q", "r"], ["cat dog", "bird"], [["dog"], ["a cat"]], [[4], [0]], ["x:1", "x:2"])
    task = Task("tiny", ("start", "end"), examples, {"dev": examples})
    spans = np.array([[-1, -1], [0, 3], [4, 7], [-1, -1], [4, 7], [-1, -1], [0, 4]])
    labels = np.array([[2, 2], [1, 1], [0, 0]])
    windows = Windows(np.array([0, 0, 1]), spans)
    tokens = Tokens(np.zeros(7, int), np.zeros(7, int), np.array([0, 3, 5, 7]), labels, 0, windows=windows)
    logits = [np.zeros((4, 2)) for _ in range(3)]
    logits[0][[0, 1, 3]] = [[9, 9], [1, 1], [9, 9]]
    logits[1][1] = [2, 2]
    scores = PROBLEMS["question-answering"].score(task, examples, tokens, logits)
    chances = np.log([np.exp(9) + np.e + 1, np.exp(2) + 1, 2])
    assert scores == pytest.approx({"f1": 1 / 2, "exact_match": 1 / 2, "loss": np.mean(chances - [0, 2, 0])})
    logits[2][:] = np.nan
    assert all(map(np.isnan, PROBLEMS["question-answering"].score(task, examples, tokens, logits).values()))


@pytest.mark.parametrize(("surest", "right"), [(4.5, ["dog", ""]), (1.5, ["dog", "bird"]), (9.0, ["", ""])])
def test_no_answer_is_given_where_no_window_has_a_surer_span(surest, right):
    """Two windows of an answerable question, one of a question without an answer; spans have sums of logits of 2, 8 and 4."""
    train = Questions(["q"], ["cat dog"], [[]], [[]], ["x:1"])
    examples = Questions(["q", "r"], ["cat dog", "bird"], [right[:1], right[1:]], [[0], [0]], ["x:1", "x:2"])
    task = Task("tiny", ("start", "end"), train, {"dev": examples})
    spans = np.array([[-1, -1], [0, 3], [-1, -1], [4, 7], [-1, -1], [0, 4]])
    windows = Windows(np.array([0, 0, 1]), spans)
    tokens = Tokens(
        np.zeros(6, int), np.zeros(6, int), np.array([0, 2, 4, 6]), np.zeros((3, 2), int), 0, windows=windows
    )
    logits = [np.array([[surest / 2 + extra] * 2, [span] * 2]) for extra, span in ((4, 1), (0, 4), (0, 2))]
    assert PROBLEMS["question-answering"].score(task, examples, tokens, logits)["exact_match"] == 1


@pytest.mark.parity
def test_run_of_plain_text_has_perplexity_and_forgetting(tmp_path):
    """The held text is that of the dev set here, so that its loss is the same."""
    decoders.write(tmp_path / "base", tie_word_embeddings=True, eos_token_id=9)
    generator = np.random.default_rng(0)
    (tmp_path / "texts").mkdir()
    for name, count in (("train", 400), ("dev", 100)):
        (tmp_path / f"texts/{name}.txt").write_text(" ".join(generator.choice(tiny.WORDS[:6], count)))
    dev = str(tmp_path / "texts/dev.txt")
    options = {"data__source": "text", "data__dir": str(tmp_path / "texts"), "data__held_text": dev, "train__epochs": 3}
    results, out = runs.run(tmp_path, **SHORT | options)
    check(results, out, ["loss", "perplexity", "loss_held", "perplexity_held"])
    before, final = results["before"], results["final"]
    assert final["loss"] < before["loss"]
    assert final["perplexity"] == pytest.approx(np.exp(final["loss"]))
    assert final["loss_held"] == pytest.approx(final["loss"])
    assert results["forgetting"] == pytest.approx(final["loss"] - before["loss"])
    assert dev not in (out / "model/README.md").read_text()


@pytest.mark.parity
@pytest.mark.parametrize("some_without", [False, True])
def test_run_of_questions(tmp_path, some_without):
    """The answer is the animal of a text; texts are longer than a row. Every third may have no animal, as in SQuAD v2.0."""
    generator = np.random.default_rng(0)
    (tmp_path / "questions").mkdir()
    for name, count in (("train", 64), ("dev", 20)):
        paragraphs = []
        for number in range(count):
            words = generator.choice(["the", "sees", "runs", "big"], 14).tolist()
            if some_without and not number % 3:
                question = {"question": "is ?", "answers": [], "is_impossible": True}
                paragraphs.append({"context": " ".join(words), "qas": [question]})
                continue
            place = int(generator.integers(14))
            words[place] = animal = ("cat", "dog")[generator.integers(2)]
            answer = {"text": animal, "answer_start": len(" ".join([*words[:place], ""]))}
            paragraphs.append({"context": " ".join(words), "qas": [{"question": "is ?", "answers": [answer]}]})
        (tmp_path / f"questions/{name}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    options = {"data__dir": str(tmp_path / "questions"), "data__source": "squad", "train__epochs": 6}
    results, out = runs.run(tmp_path, **SHORT | options, train__learning_rate=3e-2)
    kinds = ["f1_answerable", "f1_unanswerable"] if some_without else []
    config = check(results, out, ["f1", "exact_match", *kinds, "loss"])
    assert config["architectures"] == ["BertForQuestionAnswering"]
    assert results["final"]["exact_match"] > max(results["before"]["exact_match"], 0.5)
    assert "AutoModelForQuestionAnswering" in (tmp_path / "hf/README.md").read_text()
