"""The pruning schedule of a run, the examples that its scores read, and the weights that pruning changes."""

import dataclasses

import jax
import numpy as np
import pytest

import decoders
import dsee_jax
import runs
from dsee_jax import masks, tree
from dsee_jax.config import Config, PruneConfig, TrainConfig
from dsee_jax.data.batches import Batches, whole_steps
from dsee_jax.errors import InputError
from dsee_jax.prune import calibration, sensitivity
from dsee_jax.train import calibrated, kernels, losses, pruning, setup, stages, step

SEARCH = PruneConfig(kind="earlybert", heads=1, search=1)


def cubic(**options):
    return PruneConfig(schedule="cubic", **options)


def test_one_shot_prunes_once():
    assert pruning.sparsities(PruneConfig(sparsity=0.7), 100) == {0: 0.7}


def test_cubic_literals():
    """1 - (1 - t)^3 at three steps from 0 to 50 of 100, half of the way to the last step, 99."""
    schedule = pruning.sparsities(cubic(sparsity=0.54, schedule_updates=3), 100)
    assert list(schedule) == [0, 25, 50]
    assert list(schedule.values()) == pytest.approx([0.38, 0.52, 0.54])


@pytest.mark.parametrize(
    ("options", "steps_per_epoch", "expected"),
    [
        ({}, 100, {"tune": 1, "retune": 3}),
        ({"train": TrainConfig(epochs=1, retune_epochs=3, least_steps=800)}, 100, {"tune": 2, "retune": 6}),
        ({"train": TrainConfig(epochs=1, retune_epochs=3, most_steps=200)}, 100, {"tune": 0.5, "retune": 1.5}),
        ({"train": TrainConfig(epochs=3, most_steps=200), "prune": SEARCH}, 100, {"search": 0.5, "tune": 1.5}),
    ],
)
def test_all_stages_together_keep_the_limits_of_steps(options, steps_per_epoch, expected):
    config = Config(**{"train": TrainConfig(epochs=1, retune_epochs=3)} | options)
    assert stages.passes(config, steps_per_epoch) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "steps_per_epoch", "expected"),
    [
        ({"epochs": 1, "retune_epochs": 2, "most_steps": 10_000}, 4210, {"tune": 3333, "retune": 6667}),
        ({"epochs": 1, "retune_epochs": 2, "most_steps": 2}, 4210, {"tune": 1, "retune": 1}),
        ({"epochs": 1, "retune_epochs": 999, "most_steps": 10}, 7, {"tune": 1, "retune": 9}),
        # Asked for as many as the limit, in halves of steps.
        ({"epochs": 0.5, "retune_epochs": 0.5, "most_steps": 5}, 5, {"tune": 2, "retune": 3}),
        ({"epochs": 0.5, "retune_epochs": 0.5, "most_steps": 6}, 5, {"tune": 3, "retune": 3}),
        # In floating point 42400 times the 42400th part of this number is more than the number.
        ({"epochs": 3000, "most_steps": 87375160}, 42400, {"tune": 87375160}),
    ],
)
def test_limit_of_steps_is_never_exceeded(options, steps_per_epoch, expected):
    """Each stage has whole steps, one or more."""
    prune = PruneConfig() if "retune" in expected else PruneConfig(kind="none")
    passes = stages.passes(Config(train=TrainConfig(**options), prune=prune), steps_per_epoch)
    assert {name: whole_steps(epochs, steps_per_epoch) for name, epochs in passes.items()} == expected


def test_fraction_of_a_stage_gives_as_many_evaluations_as_it_has_parts():
    """The last two of a stage of 333 steps are 83 steps apart, not one."""
    assert stages.evaluations(0.25, 333, 100) == [83, 166, 250, 333]
    assert stages.evaluations(0.333, 1000, 100) == [333, 667, 1000]
    assert stages.evaluations(0.25, 3, 100) == [1, 2, 3]
    assert stages.evaluations(0.9, 10, 100) == [10]
    assert stages.evaluations(4, 10, 5) == [4, 8, 10]
    assert stages.evaluations(0, 10, 5) == [5, 10]


def test_interleaved_literals():
    """Half of the weights that are left go at the start of each of three rounds."""
    config = PruneConfig(schedule="interleaved", sparsity=0.875, schedule_updates=3)
    schedule = pruning.sparsities(config, 100)
    assert schedule == pytest.approx({0: 0.5, 33: 0.75, 67: 0.875})
    assert pruning.rounds(config, 100) == [0, 33, 67]
    assert pruning.rounds(cubic(), 100) == [0]


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [
        ({"sparsity": 0.5}, 500, "cubic"),
        ({"sparsity": 0.7}, 499, "one_shot"),
        ({"sparsity": 0.4}, 1000, "one_shot"),
        ({"kind": "nm"}, 1000, "one_shot"),
        ({"sparsity": 0.7, "score": "SPARSEGPT", "scope": "tensor"}, 1000, "one_shot"),
        ({"kind": "structured", "heads": 1}, 1000, "one_shot"),
    ],
)
def test_automatic_schedule_follows_its_rule(options, total, expected):
    assert pruning.schedule(PruneConfig(schedule="auto", **options), total) == expected


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7])
@pytest.mark.parametrize(
    "options",
    [{"schedule": "interleaved"}, *({"schedule": "cubic", "schedule_fraction": part} for part in (0.1, 0.5, 1.0))],
)
def test_schedule_reaches_the_sparsity_before_the_last_step(total, options):
    schedule = pruning.sparsities(PruneConfig(sparsity=0.5, **options), total)
    assert min(schedule) == 0
    assert max(schedule) <= max(total - 1, 0)
    assert schedule[max(schedule)] == 0.5
    assert list(schedule.values()) == sorted(schedule.values())


def test_wanda_reads_the_inputs_of_the_current_model(tmp_path):
    """Explicit scores: |W| times the input norms of the tuned, masked model on the first training batches; exact."""
    options = {"prune__score": "WANDA", "prune__scope": "tensor", "prune__calibration": 12}
    made = setup.prepare(runs.config(tmp_path, **options, delta__targets=["encoder/.*/kernel"]))
    moved = jax.tree.map(lambda leaf: leaf + 0.3, made.trained["deltas"])
    trained = made.trained | {"deltas": moved}
    before = pruning.draw(made, made.trained, {}, 0.25)
    drawn = tree.flatten(pruning.draw(made, trained, before, 0.5))

    weights = masks.apply(tree.join(tree.split(made.params, made.head)[1], trained["params"]), before)
    source = Batches(made.data.train, 8, 1.0, made.config.train.seed, made.data.edges)
    tuned = dsee_jax.materialize(weights, step.adapter(trained, made.supports, made.config.delta))
    expected = calibration.sizes(made.model, tuned, [source[0], source[1]])
    plain = calibration.sizes(made.model, made.params, [source[0], source[1]])
    differ = False
    for path, kept in drawn.items():
        old = np.asarray(tree.get(before, path))

        def lowest(sizes, path=path, old=old):
            score = np.abs(np.asarray(tree.get(made.params, path))) * np.asarray(sizes[path])[:, None]
            score[~old] = -1
            return score > np.sort(score, axis=None)[score.size // 2 - 1]

        np.testing.assert_array_equal(kept, lowest(expected))
        assert not (np.asarray(kept) & ~old).any()
        differ |= (lowest(expected) != lowest(plain)).any()
    assert differ, "the pretrained model has equal masks: the test proves nothing"


@pytest.mark.parametrize("kind", ["unstructured", "nm"])
def test_targets_may_overlap(tmp_path, kind):
    """A kernel that several targets match is pruned once, as by one of them."""
    one, several = (
        setup.prepare(runs.config(tmp_path, prune__kind=kind, prune__targets=targets))
        for targets in (["encoder/.*/kernel"], ["encoder/.*/kernel", "query", "query"])
    )
    expected, drawn = (tree.flatten(pruning.draw(made, made.trained, {}, 0.5)) for made in (one, several))
    assert expected.keys() == drawn.keys() == set(one.prunable)
    for path, mask in expected.items():
        np.testing.assert_array_equal(drawn[path], mask)


def test_calibration_reads_the_least_number_of_examples(tmp_path):
    """Of 40 examples in batches of 13, one is alone in a batch, which the seed may put first; its filler rows do not count."""
    made = setup.prepare(runs.config(tmp_path, train__batch_size=13, prune__calibration=13, prune__score="WANDA"))
    read = []
    for seed in range(12):
        train = dataclasses.replace(made.config.train, seed=seed)
        batches = calibrated.batches(made._replace(config=dataclasses.replace(made.config, train=train)))
        read.append([int(batch["weights"].sum()) for batch in batches])
    assert {tuple(examples) for examples in read} == {(13,), (1, 13)}
    every = dataclasses.replace(made.config, prune=dataclasses.replace(made.config.prune, calibration=1000))
    assert len([*calibrated._examples(made._replace(config=every))]) == 40


@pytest.mark.slow
def test_calibration_keeps_the_limit_of_tokens(tmp_path):
    """In micro-batches the statistics are the same; of single rows, too."""
    options = {"prune__score": "SPARSEGPT", "prune__calibration": 16, "data__max_length": 8}
    whole = setup.prepare(runs.config(tmp_path, **options))
    parts = setup.prepare(runs.config(tmp_path, **options, data__batch_tokens=8))
    batches = calibrated.batches(whole), calibrated.batches(parts)
    assert all(batch["input_ids"].size <= 8 for batch in batches[1])
    assert sum(batch["weights"].sum() for batch in batches[0]) == sum(batch["weights"].sum() for batch in batches[1])
    one, other = (calibration.grams(whole.model, whole.params, each) for each in batches)
    for path, gram in one.items():
        np.testing.assert_allclose(other[path], gram, atol=1e-5, err_msg=path)
    masks = [tree.flatten(pruning.reconstruct(made, made.trained)[2]) for made in (whole, parts)]
    for path, mask in masks[0].items():
        assert np.mean(np.asarray(mask) != np.asarray(masks[1][path])) < 0.02, path


@pytest.mark.slow
def test_gradients_are_those_of_single_examples_on_the_tuned_model(tmp_path):
    """The root mean square over examples, with respect to the folded kernels of the tuned, masked model."""
    options = {"prune__score": "TAYLOR", "prune__calibration": 8, "delta__targets": ["encoder/.*/kernel"]}
    made = setup.prepare(runs.config(tmp_path, **options))
    trained = made.trained | {"deltas": jax.tree.map(lambda leaf: leaf + 0.3, made.trained["deltas"])}
    flat = {path: np.arange(tree.get(made.params, path).size) % 3 > 0 for path in made.prunable}
    kept = tree.unflatten({path: mask.reshape(tree.get(made.params, path).shape) for path, mask in flat.items()})
    found = calibrated.evidence(made, trained, kept)["gradients"]
    (batch,) = calibrated.batches(made)

    params, adapter = calibrated.current(made, trained)
    tuned = dsee_jax.materialize(masks.apply(params, kept), adapter)

    def example_losses(params):
        logits = dsee_jax.apply(made.model, params, None, {name: batch[name] for name in dsee_jax.models.INPUTS})
        return losses.cross_entropy(logits, batch)

    expected = jax.jacrev(example_losses)(tuned)
    assert [*found] == made.prunable
    for path, gradient in found.items():
        of_examples = np.asarray(tree.get(expected, path))
        np.testing.assert_allclose(gradient, np.sqrt(np.square(of_examples).mean(0)), atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_changed_weights_are_restored_bit_by_bit_and_damage_is_found(tmp_path):
    """Frozen kernels come back from the folder of the run; kernels that the run trains are in its checkpoints."""
    options = {"prune__score": "SPARSEGPT", "prune__scope": "tensor"}
    made = setup.prepare(runs.config(tmp_path, **options))
    after, trained, drawn = pruning.reconstruct(made, made.trained)
    assert jax.tree.map(np.array_equal, trained, made.trained)
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(InputError, match=r"kernels\.safetensors is missing or damaged"):
        kernels.restored(made, out)
    kernels.save(after, drawn, out)
    again = tree.flatten(kernels.restored(made, out).params)
    for path, leaf in tree.flatten(after.params).items():
        np.testing.assert_array_equal(again[path], leaf)
        changed = path in tree.flatten(drawn)
        assert np.array_equal(leaf, tree.get(made.params, path)) != changed
        if changed:
            assert (np.asarray(leaf)[~np.asarray(tree.get(drawn, path))] == 0).all()
    file = out / "pruned" / kernels.FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"kernels\.safetensors is missing or damaged"):
        kernels.restored(made, out)


def test_full_fine_tuning_trains_the_changed_weights_on(tmp_path):
    options = {"prune__score": "SPARSEGPT", "prune__kind": "nm", "delta__rank": 0, "delta__nonzeros": 0}
    made = setup.prepare(runs.config(tmp_path, **options, train__full=True, prune__targets=["query"]))
    after, trained, drawn = pruning.reconstruct(made, made.trained)
    (path,) = tree.flatten(drawn)
    assert not np.array_equal(tree.get(trained["params"], path), tree.get(made.trained["params"], path))
    np.testing.assert_array_equal(tree.get(after.params, path), tree.get(made.params, path))


@pytest.mark.slow
def test_dimensions_go_by_the_sensitivity_of_the_loss(tmp_path, monkeypatch):
    """The scores of the hidden dimensions are those of all uses, of the calibration examples."""
    options = {"prune__kind": "structured", "prune__score": "TAYLOR", "prune__calibration": 8, "prune__hidden": 6}
    made, scores = setup.prepare(runs.config(tmp_path, **options)), []
    taylor = sensitivity.taylor
    monkeypatch.setattr(sensitivity, "taylor", lambda *args, **more: scores.append(taylor(*args, **more)) or scores[-1])
    kept = pruning.draw(made, made.trained, {}, 0.0)["hidden"]
    np.testing.assert_array_equal(np.flatnonzero(~kept), np.sort(np.argsort(np.asarray(scores[0]["hidden"]))[:6]))


@pytest.mark.slow
def test_run_without_layers_and_dimensions_computes_the_masked_model(tmp_path):
    """The cut model with its cut updates, by the step of the run, against the tuned model with all units."""
    options = {"prune__kind": "structured", "prune__score": "W", "delta__targets": ["encoder/.*/kernel"]}
    options |= {"prune__layers": 1, "prune__hidden": 0.25, "prune__heads": 1}
    begun = setup.prepare(runs.config(tmp_path, layers=3, **options))
    trained = jax.tree.map(lambda leaf: leaf + 0.1, begun.trained)
    kept = pruning.draw(begun, trained, {}, 0.0)
    assert (kept["layers"].sum(), kept["hidden"].sum()) == (2, 18)
    small, cut, _ = pruning.apply_cut(begun, trained, kept)
    batch, delta = stages.batches(begun, 1)[0], begun.config.delta

    def logits(one, values):
        return jax.jit(lambda: step.predict(one.model, values, pruning.freeze(one, {}), batch, delta))()

    with dsee_jax.prune.masked(begun.model, kept):
        masked = logits(begun, trained)
    np.testing.assert_allclose(logits(small, cut), masked, atol=1e-5 * float(np.abs(masked).max()))
    assert not np.allclose(masked, logits(begun, trained), atol=1e-3)


@pytest.mark.slow
def test_solver_prints_nothing(tmp_path, capfd):
    """HiGHS writes past Python's sys.stdout, which may hold the output of a command; this programme is one where it does."""
    options = {"prune__kind": "structured", "prune__score": "W", "delta__targets": ["encoder/.*/kernel"]}
    options |= {"prune__target__parameters": 0.3, "prune__target__layers": True, "prune__target__hidden": True}
    begun = setup.prepare(runs.config(tmp_path, layers=3, **options))
    trained = jax.tree.map(lambda leaf: leaf + 0.1, begun.trained)
    pruning.draw(begun, trained, {}, 0.0)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("score", ["WANDA", "SPARSEGPT"])
def test_kernel_whose_inputs_cannot_be_read_is_refused_before_the_run(tmp_path, score, scan):
    """A table of embeddings is looked up; the kernels of scanned layers are read."""
    decoders.write(tmp_path / "base", num_hidden_layers=2)
    common = runs.causal_lm(tmp_path, prune__score=score, prune__scope="tensor", model__scan=scan)
    targets = ["q_proj", "embeddings/word/embedding"]
    with pytest.raises(InputError, match=f"prune.targets, with prune.score {score}: .* 'embeddings/word/embedding'"):
        setup.prepare(runs.config(tmp_path, prune__targets=targets, **common))
    setup.prepare(runs.config(tmp_path, prune__targets=targets[:1], **common))
