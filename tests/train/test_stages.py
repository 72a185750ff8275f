"""The stages of a run: the data that each reads, and the arrays that stay in memory."""

import gc
from typing import Any, cast

import jax
import numpy as np
import pytest

import runs
from dsee_jax import tree
from dsee_jax.ckpt import checkpoints, folders
from dsee_jax.errors import InputError
from dsee_jax.train import pruning, stages, trainer
from dsee_jax.train.programs import make_programs
from dsee_jax.train.setup import prepare


def examples(source):
    """Return the ids of every example of a stage, without filler rows."""
    batches = [source[number] for number in range(len(source))]
    rows = [(row, keep) for batch in batches for row, keep in zip(batch["input_ids"], batch["weights"], strict=True)]
    return sorted(tuple(row[row > 0].tolist()) for row, keep in rows if keep)


@pytest.mark.parametrize("kind", ["unstructured", "earlybert"])
def test_stages_of_half_a_pass_each_read_every_example_once(tmp_path, kind):
    cut = {"prune__kind": "earlybert", "prune__heads": 1, "prune__search": 0.4} if kind == "earlybert" else {}
    options = cut | {"train__epochs": 0.6 if cut else 0.4, "train__retune_epochs": 0.6}
    made = prepare(runs.config(tmp_path, **options))
    names = [name for name in stages.names(made.config) if name in ("search", "tune", "retune")]
    first, second = (stages.training_stage(made, name).source for name in names)
    assert (len(first), len(second)) == (2, 3)
    assert sorted(examples(first) + examples(second)) == examples(stages.batches(made, 1))
    whole = stages.batches(made, 1)
    np.testing.assert_array_equal(first[0]["input_ids"], whole[0]["input_ids"])


@pytest.mark.parametrize("settled", [3, 4, 9])
def test_stage_saves_its_end_whichever_way_it_ends(tmp_path, monkeypatch, settled):
    """A search of five steps that is checked after each, with no other checkpoints."""
    made, saved = prepare(runs.config(tmp_path, train__epochs=1)), []
    monkeypatch.setattr(checkpoints, "save", lambda store, mark, *rest: saved.append((mark, rest[-1]["step"])))
    store: Any = None
    session, stage = trainer.Session(store, tmp_path, print), stages.training_stage(made, "tune")
    programs = make_programs(made)._replace(step=lambda state, *rest: (state, np.float32(1)))
    state = trainer.State(np.int32(0), made.trained, ())
    progress = trainer.Progress("search", 0, None, None, [], 0.0, 0, [])
    hooks = trainer.Hooks(
        due=lambda done: True, visit=lambda point, done: (point, ""), over=lambda progress: progress.step == settled
    )
    point = trainer.Point(state, pruning.freeze(made, {}), {}, progress)
    point = trainer.fit(session, trainer.Run(made, programs, {}, {}, progress), stage, point, hooks)
    end = min(settled, len(stage.source))
    assert point.progress.step == end
    assert saved == [(stage.offset + end, end)]


@pytest.mark.parametrize("resumed", [False, True])
def test_stage_with_nothing_to_train_is_skipped(tmp_path, resumed):
    """With one line; a run that an earlier version began to re-tune goes on too."""
    nothing, store, said = {"deltas": {}, "params": {}}, cast(Any, None), []
    made = prepare(runs.config(tmp_path))._replace(trained=nothing)
    progress = trainer.Progress("retune", 0, None, None, [{"name": "prune", "metrics": {"loss": 1.0}}], 0.0, 0, [])
    run = trainer.Run(made, make_programs(made), None if resumed else nothing, {}, progress)
    after = stages.retune(trainer.Session(store, tmp_path, said.append), run)
    assert said == ["retune: skipped, because the cut removed all that this run trains"]
    assert (after.trained, after.progress) == (nothing, progress)
    assert not (tmp_path / folders.LOG).exists()


COPIES = {
    "sparsegpt": (1, {"prune__score": "SPARSEGPT", "prune__scope": "tensor"}),
    "sparsegpt, distilled from logits": (
        1,
        {"prune__score": "SPARSEGPT", "prune__scope": "tensor", "train__distill__weight": 0.5},
    ),
    "sparsegpt, the teacher runs": (
        2,
        {
            "prune__score": "SPARSEGPT",
            "prune__scope": "tensor",
            "train__distill__weight": 0.5,
            "train__distill__hidden": 1.0,
        },
    ),
    "masked": (2, {"prune__score": "W"}),
    "structured": (0, {"prune__kind": "structured", "prune__neurons": 8}),
}
"""Kind of run -> (copies, options). The copies of a frozen kernel at its first size while the run re-tunes. Masks need the
unpruned kernel, and so does a teacher that the steps run."""


@pytest.mark.slow
@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", COPIES)
def test_no_copy_of_a_frozen_kernel_stays_without_need(tmp_path, monkeypatch, kind):
    expected, options = COPIES[kind]
    made = prepare(runs.config(tmp_path, **options))
    (shape,) = {leaf.shape for path, leaf in tree.flatten(made.params).items() if path.endswith("up/kernel")}
    del made
    fit, found = trainer.fit, {}

    def counting(session, run, stage, point, hooks):
        gc.collect()
        before = [leaf for leaf in jax.live_arrays() if leaf.shape == shape and leaf.dtype == "float32"]
        found[stage.name] = len({leaf.unsafe_buffer_pointer() for leaf in before})
        return fit(session, run, stage, point, hooks)

    monkeypatch.setattr(trainer, "fit", counting)
    gc.collect()
    others = len([leaf for leaf in jax.live_arrays() if leaf.shape == shape and leaf.dtype == "float32"])
    runs.run(tmp_path, **options, train__epochs=0.2, train__retune_epochs=0.2)
    assert found == {"tune": 1 + others, "retune": expected + others}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sparsegpt", "masked"])
def test_pruning_weights_compiles_no_step_again(tmp_path, monkeypatch, kind):
    """One program of a step for one length, in both stages: compiling is a large part of a short run, and of its memory."""
    fit, found = trainer.fit, []

    def counting(session, run, *rest):
        point = fit(session, run, *rest)
        found.append((run.programs.step, run.programs.step._cache_size()))
        return point

    monkeypatch.setattr(trainer, "fit", counting)
    runs.run(tmp_path, **COPIES[kind][1], train__epochs=0.2, train__retune_epochs=0.2)
    (step, programs), (again, after) = found
    assert step is again
    assert programs == after == 1


def test_buckets_are_the_most_lengths_of_batches(tmp_path):
    """Sentences of three and of seven words."""
    runs.config(tmp_path)
    data = runs.table(tmp_path / "lengths", words=(3, 7))
    many, one = (prepare(runs.config(tmp_path, data__dir=data, data__buckets=each)).data.edges for each in (16, 1))
    assert len(many) == 2
    assert one.tolist() == [max(many)]
    with pytest.raises(InputError, match=r"data\.buckets is 0; expected 1 or more"):
        runs.config(tmp_path, data__buckets=0)
