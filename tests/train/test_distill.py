"""Distillation in runs: the kept teacher, its outputs, its inner states, and interruptions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import decoders
import runs
import tiny
from dsee_jax import tree
from dsee_jax.config import DistillConfig
from dsee_jax.data.batches import assemble
from dsee_jax.data.tokens import Tokens
from dsee_jax.errors import InputError
from dsee_jax.prune import selection
from dsee_jax.runtime import files, preemption
from dsee_jax.train import distill, hashes, loop, pruning, setup, stages, step, teachers

DISTILLED = {"train__distill__weight": 0.5, "train__distill__schedule": "linear"}
INNER_STATES = DistillConfig(weight=0.5, hidden=1.0)
"""Of a run whose steps run the teacher, which has no outputs on the disk."""


def test_weight_is_constant_or_falls_to_zero():
    constant, linear = (distill.weights(DistillConfig(0.8, schedule=name), 4) for name in ("constant", "linear"))
    assert [float(constant(number)) for number in range(4)] == pytest.approx([0.8] * 4)
    assert [float(linear(number)) for number in range(4)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_outputs_belong_to_the_tokens_that_count():
    """Examples of three and two tokens, of which two and one count, computed with the longest first, and two filler rows."""
    tokens = small()
    places = teachers._places(tokens, True)
    assert [each.tolist() for each in places] == [[1, 2], [4]]
    order = [np.array([1, 0])]
    array = np.arange(12.0).reshape(4, 3)  # row 0 is example 1
    piece = teachers._picked(array, order[0], tokens, places, True)
    assert piece.tolist() == [1, 4, 5]
    outputs = teachers._indexed(tokens, True, order, [{"teacher": piece}])
    batch = assemble(tokens._replace(teacher=outputs), np.array([0, 1]), np.array([3]))
    assert batch["teacher"][batch["weights"] > 0].tolist() == [4, 5, 1]


def small():
    ids = np.arange(5, dtype=np.int32)
    return Tokens(ids, 0 * ids, np.array([0, 3, 5]), ids, 0, np.array([0, 1, 1, 0, 1], np.float32))


class Death(Exception):
    """Simulates the end of a process."""


@pytest.fixture
def prepared(tmp_path):
    """``(folder, setup, trained, examples)`` of a run that distils; the trained values differ from those of the base."""
    chosen = runs.config(tmp_path, **DISTILLED)
    made = setup.prepare(chosen)
    trained = jax.tree.map(lambda leaf: leaf + 0.02, made.trained)
    return tmp_path / "run", made, trained, np.arange(made.data.train.size)


@pytest.mark.slow
def test_stale_or_damaged_outputs_are_computed_again(prepared, monkeypatch):
    """And nothing else is: of three parts the damaged one only; all of them for another teacher, base or other examples.

    A signal ends the first pass after a part, which is kept.
    """
    out, made, trained, examples = prepared
    monkeypatch.setattr(teachers, "PART", 2)
    computed, compute = [], teachers._compute

    def counting(setup, trained, key, paths, examples):
        computed.append(sorted(paths))
        compute(setup, trained, key, paths, examples)

    monkeypatch.setattr(teachers, "_compute", counting)
    out.mkdir()
    hashes.write(out, {"base": {"weights": "a"}})
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "asked", lambda: True)
        with pytest.raises(preemption.Preempted, match="saved at part 1 of the outputs"):
            teachers.save(out, made, trained, examples)
    teachers.save(out, made, trained, examples)
    _, first = teachers.load(out, made, examples)
    assert computed == [[0, 1, 2], [1, 2]]
    computed.clear()
    damaged = out / "teacher" / "outputs_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"abcd")
    _, again = teachers.load(out, made, examples)
    assert computed == [[1]]
    np.testing.assert_array_equal(first.arrays["teacher"], again.arrays["teacher"])
    teachers.save(out, made, made.trained, examples)
    _, other = teachers.load(out, made, examples)
    assert computed[1:] == [[0, 1, 2]]
    assert np.abs(other.arrays["teacher"] - first.arrays["teacher"]).max() > 1e-4
    hashes.write(out, {"base": {"weights": "b"}})
    teachers.load(out, made, examples)
    assert computed[2:] == [[0, 1, 2]]
    teachers.load(out, made, examples[:16])
    assert computed[3:] == [[0]]
    tuned = out / "teacher" / "tuned.safetensors"
    tuned.write_bytes(tuned.read_bytes()[:-4] + b"abcd")
    with pytest.raises(InputError, match=r"tuned.safetensors is damaged, or of another run; .* delete .*run to begin"):
        teachers.load(out, made, examples)


def test_teacher_of_another_task_is_refused(prepared):
    """Its trained values have the same shapes, and its classes other names."""
    out, made, trained, examples = prepared
    out.mkdir()
    tuned = out / "teacher" / "tuned.safetensors"
    teachers._write(tuned, tree.flatten(trained), teachers._origin(out, made))
    other = made._replace(data=made.data._replace(task=dataclasses.replace(made.data.task, labels=["ham", "spam"])))
    with pytest.raises(
        InputError, match=r'tuned.safetensors is of another task: found labels .*"no", "yes".* expected .*"ham"'
    ):
        teachers.load(out, other, examples)
    tuned.unlink()
    with pytest.raises(InputError, match=r"tuned.safetensors is missing; .* restore it"):
        teachers.load(out, made, examples)


@pytest.mark.parametrize("other", ["data", "config"])
def test_teacher_of_another_run_is_refused(prepared, other):
    """Tasks may have the same classes, as RTE and QNLI, and two runs of one task other settings."""
    out, made, trained, examples = prepared
    out.mkdir()
    made = made._replace(
        config=dataclasses.replace(made.config, train=dataclasses.replace(made.config.train, distill=INNER_STATES))
    )
    begun = {"data": {"train": "a"}, "config": {"settings": "a"}}
    hashes.write(out, begun)
    teachers.save(out, made, trained, examples)
    hashes.write(out, begun | {other: {"train": "b", "settings": "b"}})
    name = {"data": "data_sha256", "config": "settings_sha256"}[other]
    with pytest.raises(
        InputError, match=f'tuned.safetensors is of another run: found {name} ".*", expected ".*"; it holds'
    ):
        teachers.load(out, made, examples)
    allowing = dataclasses.replace(made.config.train, allow_changed_inputs=True)
    allowed = made._replace(config=dataclasses.replace(made.config, train=allowing))
    if other == "config":
        with pytest.raises(InputError, match="of another run"):
            teachers.load(out, allowed, examples)
        return
    for each in (allowed, made):  # the permission is of one call
        values, _ = teachers.load(out, each, examples)
        jax.tree.map(np.testing.assert_array_equal, values, trained)


@pytest.mark.slow
def test_teacher_runs_over_the_examples_that_retuning_reads(tmp_path, monkeypatch):
    """Two batches of eight, of forty examples; once."""
    options = DISTILLED | {"train__epochs": 0.2, "train__retune_epochs": 0.4}
    computed, compute = [], teachers._compute
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "_compute", lambda *args: computed.append(len(args[-1])) or compute(*args))
        _, out = runs.run(tmp_path, **options)
    assert computed == [16]
    (path,) = (out / "teacher").glob("outputs_*.safetensors")
    assert len(load_file(path)["teacher"]) == 16
    made = setup.prepare(runs.config(tmp_path, **options))
    source = stages.training_stage(made, "retune").source
    _, some = teachers.load(out, made, source.examples())
    _, every = teachers.load(out, made, np.arange(40))
    assert len(every.arrays["teacher"]) == 40
    left, right = (
        dataclasses.replace(source, tokens=source.tokens._replace(teacher=outputs)) for outputs in (some, every)
    )
    for number in range(2):
        np.testing.assert_allclose(left[number]["teacher"], right[number]["teacher"], rtol=1e-4, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("decoder", [False, True])
def test_run_that_dies_in_the_teacher_pass_and_in_retune_gives_the_same_result(tmp_path, monkeypatch, decoder):
    """A decoder keeps the most probable tokens of every position."""
    monkeypatch.setattr(teachers, "PART", 1 if decoder else 2)
    options = {"train__eval_every": 4, "train__checkpoint_every": 3} | DISTILLED
    if decoder:
        decoders.write(tmp_path / "base", num_hidden_layers=1)
        options |= runs.causal_lm(tmp_path, generate__new_tokens=0, train__distill__top_k=4, train__retune_epochs=3)
    loop.run(runs.config(tmp_path, **options), say=lambda text: None)
    again = runs.config(tmp_path, output_dir=str(tmp_path / "again"), **options)
    write, append, written = teachers._write, files.append, []

    def dying(path, arrays, key):
        write(path, arrays, key)
        written.append(path.name)
        if len(written) == 2:
            raise Death

    def later(path, record):
        append(path, record)
        if (record["stage"], record["step"]) == ("retune", 8):
            raise Death

    for module, name, function in ((teachers, "_write", dying), (files, "append", later)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, function)
            with pytest.raises(Death):
                loop.run(again, say=lambda text: None)
    parts = sorted(path.name for path in (tmp_path / "again" / "teacher").iterdir())
    assert written == ["tuned.safetensors", "outputs_00000.safetensors"]
    assert parts == [*(f"outputs_{number:05}.safetensors" for number in range(3)), "tuned.safetensors"]
    loop.run(again, say=lambda text: None)
    assert runs.figures(tmp_path / "again") == runs.figures(tmp_path / "run")
    one, other = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "again"))
    assert {name: array.tobytes() for name, array in one.items()} == {name: x.tobytes() for name, x in other.items()}


@pytest.mark.parametrize(
    "packing", [pytest.param(False, marks=pytest.mark.exhaustive), pytest.param(True, marks=pytest.mark.slow)]
)
def test_outputs_of_all_tokens_equal_those_of_the_step(tmp_path, packing):
    """A decoder: kept probabilities of the whole vocabulary, of rows in another order, and a forward pass in each step."""
    decoders.write(tmp_path / "base", num_hidden_layers=1)
    options = runs.causal_lm(tmp_path, generate__new_tokens=0, data__packing=packing, train__epochs=1, **DISTILLED)
    trained = []
    for number, k in enumerate((0, 100)):
        out = f"run_{number}"
        config = runs.config(tmp_path, output_dir=str(tmp_path / out), train__distill__top_k=k, **options)
        loop.run(config, say=lambda text: None)
        trained.append(load_file(tmp_path / out / "adapter/adapter.safetensors"))
    assert not (tmp_path / "run_0/teacher/outputs_00000.safetensors").exists()
    for name, array in trained[0].items():
        np.testing.assert_allclose(array, trained[1][name], rtol=1e-3, atol=2e-5, err_msg=name)
    plain = runs.config(tmp_path, output_dir=str(tmp_path / "plain"), **options | {"train__distill__weight": 0})
    loop.run(plain, say=lambda text: None)
    other = load_file(tmp_path / "plain/adapter/adapter.safetensors")
    assert any(np.abs(array - other[name]).max() > 1e-3 for name, array in trained[0].items())


def value_and_gradient(whole, student, trained, teacher, rows=8):
    """The loss and the gradient of a batch of a ``student`` (a setup) with a teacher, without dropout."""
    batch = assemble(whole.data.train, np.arange(rows), whole.data.edges)
    loss = distill.objective(whole.config, whole.model, whole.data.task.problem, student.kept, joined=True)

    def summed(values):
        def outputs(**more):
            frozen = pruning.freeze(student, {})
            return step.predict(student.model, values, frozen, batch, whole.config.delta, deterministic=True, **more)

        return loss(outputs, batch, teacher)

    return jax.jit(jax.value_and_grad(summed))(trained)


LINES = {
    "labels": [{"text": "the cat runs", "label": ["a", "b"]}, {"text": "a dog", "label": []}],
    "numbers": [{"text": "the cat runs", "label": 1.5}, {"text": "a dog", "label": 3}],
    "tags": [{"tokens": ["abc", "cat"], "tags": ["B-X", "O"]}, {"tokens": ["the"], "tags": ["O"]}],
    "answers": {
        "data": [
            {
                "paragraphs": [
                    {
                        "context": "the cat sees a dog",
                        "qas": [
                            {"id": str(number), "question": "a cat", "answers": [{"text": text, "answer_start": start}]}
                            for number, (text, start) in enumerate((("cat", 4), ("dog", 15), ("the cat", 0)))
                        ],
                    }
                ]
            }
        ]
    },
}
TASKS = {
    "labels": {"data__source": "jsonl", "data__multi_label": True},
    "numbers": {"data__source": "jsonl", "data__regression": True},
    "tags": {"data__source": "jsonl", "model__task": "token-classification"},
    "answers": {"data__source": "squad"},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TASKS)
def test_kept_outputs_give_the_loss_of_a_forward_pass_of_the_teacher(tmp_path, task):
    folder, content = tmp_path / "lines", LINES[task]
    folder.mkdir()
    for name in ("train", "dev"):
        if isinstance(content, dict):
            (folder / f"{name}.json").write_text(json.dumps(content))
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    options = {"data__dir": str(folder), "train__batch_size": 2, "train__distill__weight": 1.0} | TASKS[task]
    whole = setup.prepare(runs.config(tmp_path, **options))
    taught = jax.tree.map(lambda leaf: leaf + 0.1, whole.trained)
    (tmp_path / "out").mkdir()
    examples = np.arange(whole.data.train.size)
    teachers.save(tmp_path / "out", whole, taught, examples)
    _, outputs = teachers.load(tmp_path / "out", whole, examples)
    data = whole.data._replace(train=whole.data.train._replace(teacher=outputs))
    kept, _ = value_and_gradient(whole._replace(data=data), whole, whole.trained, step.Teacher(jnp.float32(1)), rows=2)
    options |= {"train__distill__hidden": 1e-30}
    whole = whole._replace(config=runs.config(tmp_path, **options))
    teacher = step.Teacher(jnp.float32(1), taught, pruning.freeze(whole, {}))
    run, _ = value_and_gradient(whole, whole, whole.trained, teacher, rows=2)
    np.testing.assert_allclose(kept, run, rtol=1e-4)
    assert float(kept) > 1e-4


INNER = {"train__distill__hidden": 1.0, "train__distill__attention": 1.0}


@pytest.mark.parametrize(
    "family", [pytest.param("encoder", marks=pytest.mark.exhaustive), pytest.param("decoder", marks=pytest.mark.slow)]
)
def test_inner_states_of_student_and_teacher_are_compared(tmp_path, family):
    """Equal models have no loss and no gradient; one with less of everything has both. Decoders recompute layers."""
    options = INNER | {"train__distill__weight": 1.0, "delta__targets": [".*/(query|up)/kernel"]}
    if family == "decoder":
        decoders.write(tmp_path / "base", num_hidden_layers=2)
        options = runs.causal_lm(tmp_path, generate__new_tokens=0, model__remat=True, **options)
    else:
        tiny.bert(tmp_path / "base", head=False)
        runs.table(tmp_path / "data")
    whole = setup.prepare(runs.config(tmp_path, **options))
    trained = jax.tree.map(lambda leaf: leaf + 0.02, whole.trained)
    teacher = step.Teacher(jnp.float32(1), trained, pruning.freeze(whole, {}))
    loss, gradient = value_and_gradient(whole, whole, trained, teacher)
    np.testing.assert_allclose(loss, 0, atol=1e-4)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, 0, atol=1e-4)
    kept = selection.select(whole.model, whole.params, None, heads=1, neurons=0.5, layers=1, hidden=4, score="W")
    student = pruning.resize(whole, kept)
    loss, gradient = value_and_gradient(whole, student, student.trained, teacher)
    assert float(loss) > 0.1
    assert all(np.abs(leaf).max() > 0 for path, leaf in tree.flatten(gradient["deltas"]).items() if path.endswith("b"))


def test_inner_states_of_a_student_with_fewer_layers_are_those_of_its_own_layers():
    """The layers 0 and 2 of the teacher, and the entries 1 to 3 of its hidden states."""
    random = np.random.default_rng(0)
    states = {f"encoder/layer_{number}/__call__": random.normal(0, 1, (2, 3, 4)) for number in range(3)}
    kept = {"layers": np.array([True, False, True]), "hidden": np.array([False, True, True, True])}
    student = {
        "encoder/layer_0/__call__": states["encoder/layer_0/__call__"][..., 1:],
        "encoder/layer_1/__call__": (2 * states["encoder/layer_2/__call__"][:, :1, 1:], None),
    }
    mask = np.ones((2, 3), np.int32)
    np.testing.assert_allclose(distill._hidden(student, states, kept, mask), [0, 0], atol=1e-5)
    student["encoder/layer_1/__call__"] = states["encoder/layer_1/__call__"][..., 1:]
    assert distill._hidden(student, states, kept, mask).min() > 0.01
