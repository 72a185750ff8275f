"""The stages of a run, each a function ``(session, run) -> run``; `STAGES` is the table of them.

A stage that trains (search, tune, retune) resumes from its newest checkpoint. The stages between them (draw, prune) are done
again where a run died in them.
"""

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsee_jax import models
from dsee_jax.ckpt import checkpoints
from dsee_jax.ckpt.folders import TEXTS
from dsee_jax.config import Config
from dsee_jax.data.batches import Batches, whole_steps
from dsee_jax.errors import Diverged, InputError
from dsee_jax.prune import budget, earlybert
from dsee_jax.runtime import console, files
from dsee_jax.train import (
    collapse,
    distill,
    evaluation,
    kernels,
    optim,
    pruning,
    sharding,
    target,
    teachers,
    trackers,
    trainer,
)
from dsee_jax.train.programs import distilling, make_programs
from dsee_jax.train.setup import Setup
from dsee_jax.train.step import Frozen, Teacher
from dsee_jax.train.trainer import Hooks, Point, Run, Session, Stage
from dsee_jax.typing import Masks

log = logging.getLogger(__name__)

CHECKS = 10
"""Checks of a search, where the config does not say how often."""


def names(config: Config) -> tuple[str, ...]:
    """Return the stages of a run in order."""
    if config.prune.kind == "earlybert":
        return "search", "draw", "tune"
    if config.prune.kind == "none":
        return ("tune",)
    return ("tune", "prune", "retune") if config.train.retune_epochs else ("tune", "prune")


def search(session: Session, run: Run) -> Run:
    """Search for a ticket (EarlyBERT, arXiv 2101.00063, section 3); the masks of the returned run are the units it keeps.

    The run's parameters are trained together with one coefficient for each head and neuron, under the L1 penalty. The
    learning rate stays at its peak after the warm-up: a falling rate alone would bring the masks to rest. The ticket is the
    mask of the last step or, where ``prune.tolerance`` is above 0, the mask that stopped moving. The trained values are
    dropped.
    """
    setup, prune = run.setup, run.setup.config.prune
    run = run._replace(programs=make_programs(setup, searching=True))
    stage = training_stage(setup, "search")
    total = len(stage.source)
    period = prune.check_every or max(total // CHECKS, 1)
    coefficients = earlybert.init(models.cuts(setup.model), setup.params)
    spent: Any = target.of_setup(setup) if prune.target.kind else None
    begin = sharding.place(setup.placed, setup.trained | {"coefficients": coefficients})

    def due(done: int) -> bool:
        return done % period == 0 or done == total

    def check(point: Point, done: int) -> tuple[Point, str]:
        learned = jax.device_get(point.state.trained["coefficients"])
        if prune.target.kind:
            size = jax.tree.map(np.abs, learned)
            kept = target.choose(setup, budget.balanced(size, spent), spent)
        else:
            kept = earlybert.draw(learned, heads=prune.heads, neurons=prune.neurons, uniform=prune.uniform)
        moved = earlybert.distance(point.masks, kept) if point.masks else {}
        record = {"coefficients": earlybert.summary(learned), "kept": earlybert.packed(kept), "distance": moved}
        session.log(stage.name, done, record, offset=stage.offset)
        distances = [*point.progress.distances, moved] if moved else point.progress.distances
        return point._replace(masks=kept, progress=point.progress._replace(distances=distances)), console.line(moved)

    # The checkpoint at the last check of a settled search resumes to no further step.
    hooks = Hooks(
        due,
        check,
        over=lambda progress: earlybert.settled(progress.distances, tolerance=prune.tolerance, patience=prune.patience),
    )
    state = trainer.start(session, run, stage, begin)
    frozen = sharding.place(setup.placed, pruning.freeze(setup, {}))
    point = trainer.fit(session, run, stage, Point(state, frozen, run.masks, run.progress), hooks)
    return run._replace(masks=point.masks, progress=point.progress)


def draw(session: Session, run: Run) -> Run:
    """Cut the heads and neurons that the search did not keep, and return to the pretrained weights."""
    setup = pruning.resize(run.setup, run.masks)
    cut = target.record(run.setup, setup)
    session.say(f"draw: {target.line(cut)}")
    run = run._replace(setup=setup, programs=make_programs(setup), trained=setup.trained, masks={})
    drawn = scored(session, run, "draw", cut) | {"steps": run.progress.step}
    progress = run.progress._replace(stage="tune", step=0, data=None, done=[*run.progress.done, drawn])
    return run._replace(progress=progress)


def tune(session: Session, run: Run) -> Run:
    """Train the updates and the head on the weights as they are, and return them as of their best evaluation."""
    return _train(session, run, "tune", {})


def prune(session: Session, run: Run) -> Run:
    """Prune the weights; units are cut out, which makes a smaller model with programs of its own.

    The model before it is the teacher of a distillation.

    Raises:
      InputError: the score cannot be computed, or chooses no cut. The newest checkpoint is still that of the stage tune.
    """
    if run.setup.config.train.distill.weight:
        teachers.save(session.out, run.setup, run.trained, training_stage(run.setup, "retune").source.examples())
    try:
        setup, trained, masks = _pruned(run)
    except InputError as error:
        examples = run.setup.config.prune.calibration
        raise InputError(
            f"stage prune: {error}; nothing is pruned yet, and the run goes on from its tuned model with the same output_dir "
            f"and other keys, such as another prune.score or prune.scope, or prune.calibration above {examples}"
        ) from None
    if run.setup.config.prune.score == "SPARSEGPT":
        kernels.save(setup, masks, session.out)
    compiled = run.programs if setup.model is run.setup.model else make_programs(setup)
    cut = target.record(run.setup, setup) if setup.kept else {}
    if cut:
        session.say(f"prune: {target.line(cut)}")
    run = run._replace(setup=setup, programs=compiled, trained=trained, masks=masks)
    done = [*run.progress.done, scored(session, run, "prune", cut)]
    return run._replace(
        progress=run.progress._replace(
            stage="retune", step=0, data=None, best=None, done=done, evaluations=0, last=None, lowest=None
        )
    )


def _pruned(run: Run) -> tuple[Setup, dict[str, Any], Masks]:
    """Return the setup, the trained values and the masks after the first pruning."""
    if run.setup.config.prune.score == "SPARSEGPT":
        return pruning.reconstruct(run.setup, run.trained)
    masks = pruning.draw(run.setup, run.trained, {}, _sparsities(run.setup)[0])
    return pruning.apply_cut(run.setup, run.trained, masks)


def retune(session: Session, run: Run) -> Run:
    """Train on after pruning, with a teacher where the run distils; a gradual schedule draws larger masks on the way."""
    setup, whole, config = run.setup, run.whole, run.setup.config.train.distill
    if whole is None:
        return _train(session, run, "retune", _sparsities(setup))
    source = training_stage(setup, "retune").source
    trained, outputs = teachers.load(session.out, whole, source.examples())
    frozen = None if trained is None else sharding.place(whole.placed, pruning.freeze(whole, {}))
    setup = setup._replace(data=setup.data._replace(train=setup.data.train._replace(teacher=outputs)))
    run = run._replace(setup=setup, programs=distilling(run.programs, setup, whole.model), whole=None)
    del whole  # its params are in ``frozen``, or not needed any more
    weight = distill.weights(config, len(source))
    return _train(
        *(session, run, "retune", _sparsities(setup)), lambda number: Teacher(weight(number), trained, frozen)
    )


STAGES: dict[str, Callable[[Session, Run], Run]] = {
    "search": search,
    "draw": draw,
    "tune": tune,
    "prune": prune,
    "retune": retune,
}
"""Every stage by its name; `names` says which of them a run has."""


def scored(session: Session, run: Run, name: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return ``{"name", "metrics"}`` of the model at the start of the next stage, and ``more``; log both and say the metrics.

    Raises:
      Diverged: a metric is not finite.
    """
    frozen = pruning.freeze(run.setup, run.masks)
    choosing = run.programs.evaluate(run.trained, frozen)
    at, scores = offset(run.setup, name), passed(session, run, run.trained, frozen, name, choosing)
    # A curve of the log is of one set of examples.
    logged = {"metrics": choosing, "score": scores["metrics"]} if "choose" in scores else scores
    session.log(name, 0, logged | (more or {}), offset=at)
    trackers.log(session.trackers, trackers.named(f"stage/{name}", scores["metrics"]), at)
    session.say(f"{name}: {console.line(scores['metrics'])}")
    return {"name": name, **scores, **(more or {})}


def passed(
    session: Session, run: Run, trained: dict[str, Any], frozen: Frozen, name: str, choosing: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Return ``{"metrics"}`` of the model that a stage passes on, those of its texts among them.

    Args:
      session: of the run.
      run: the run.
      trained: the trained values of the model.
      frozen: its other arrays.
      name: of the stage.
      choosing: the metrics of the model by which the stage may have chosen it. With ``data.split_dev`` the result has them
        apart, as ``choose``, and ``metrics`` are those of the test half.

    Raises:
      Diverged: a metric is not finite.
    """
    apart, metrics = run.setup.data.scoring, choosing
    if apart and evaluation.finite(choosing):
        metrics = run.programs.evaluate(trained, frozen, final=True)
    if not evaluation.finite(metrics):
        raise Diverged(
            f"stage {name}: the metrics on the dev set are not finite ({console.line(metrics)}): the numbers of this model "
            "exceed its dtype, or its vocabulary lacks a token of the texts"
        )
    metrics = written(session, run, trained, frozen, name) | metrics
    return {"metrics": metrics, "choose": choosing} if apart else {"metrics": metrics}


def written(session: Session, run: Run, trained: dict[str, Any], frozen: Frozen, name: str) -> dict[str, float]:
    """Return the metrics of the texts that the model writes; the texts go to a file of the stage."""
    metrics, records = run.programs.write(trained, frozen)
    if records:
        files.write_text(session.out / TEXTS.format(name), "".join(files.dumps(record) + "\n" for record in records))
    return metrics


def batches(setup: Setup, epochs: float, *, first: int = 0) -> Batches:
    """Return the training batches of ``epochs`` passes over the data, by step; the order begins at its step ``first``."""
    train = setup.config.train
    options: dict[str, Any] = {"seed": train.seed, "edges": setup.data.edges, "first": first}
    return Batches(setup.data.train, train.batch_size, epochs=epochs, **options)


def training_stage(setup: Setup, name: str) -> Stage:
    """Return a stage that trains: search, tune or retune.

    Its data go on where those of the stage before end, so that two stages of half a pass each read every example once. A
    search that settles early counts as a whole one.
    """
    train = setup.config.train
    source = batches(setup, _epochs(setup)[name], first=sum(_earlier(setup, name)))
    peak = train.retune_learning_rate if name == "retune" else 0.0
    peak, steps = peak or train.learning_rate, len(source)
    if name == "search":
        rate = optim.warmup_constant(peak, steps, train.warmup)
    else:
        begins = pruning.rounds(setup.config.prune, steps) if name == "retune" else [0]
        rate = optim.restarted(peak, begins, steps, train.warmup)
    return Stage(name, source, rate, offset(setup, name))


def offset(setup: Setup, name: str) -> int:
    """Return the number of the checkpoint before the first step of a stage; of ``before``, which precedes all, it is 0."""
    # A stage of n steps has n + 1 checkpoints at most: one before its first step.
    return sum(steps + 1 for steps in _earlier(setup, name))


def _earlier(setup: Setup, name: str) -> list[int]:
    """Return the steps of the stages that train before a stage."""
    epochs = _epochs(setup)
    stages = itertools.takewhile(lambda stage: stage != name, ("before", *names(setup.config)))
    return [len(batches(setup, epochs[stage])) for stage in stages if stage in epochs]


def passes(config: Config, steps_per_epoch: int) -> dict[str, float]:
    """Return the passes over the training data of each stage that trains, in the order of the stages.

    One factor brings the steps of all stages together within ``train.least_steps`` and ``train.most_steps``. Each stage has
    whole steps, rounded up unless all together would be more than ``train.most_steps``, which they then are exactly.
    """
    train = config.train
    asked = {"search": config.prune.search, "tune": train.epochs, "retune": train.retune_epochs}
    asked = {name: asked[name] for name in names(config) if name in asked}
    total, most = sum(asked.values()) * steps_per_epoch, train.most_steps
    bounded = min(max(total, train.least_steps), most or math.inf)
    bounded_passes = {name: epochs * bounded / total for name, epochs in asked.items()}
    if not most or sum(whole_steps(epochs, steps_per_epoch) for epochs in bounded_passes.values()) <= most:
        return bounded_passes
    return _in_steps(asked, most, steps_per_epoch)


def _in_steps(asked: dict[str, float], total: int, steps_per_epoch: int) -> dict[str, float]:
    """Return passes in proportion to ``asked``, whose steps are ``total`` together; each stage has one or more."""
    passes, left = dict[str, float](), total
    for place, name in enumerate(asked):
        later = [*asked.values()][place:]
        own = min(max(round(left * asked[name] / sum(later)), 1), left - len(later) + 1)
        # The steps of these passes are rounded up: a quotient that is rounded up itself would give one more.
        passes[name], left = math.nextafter(own / steps_per_epoch, 0.0), left - own
    return passes


def evaluations(every: int | float, total: int, steps_per_epoch: int) -> list[int]:
    """Return the steps of a stage of ``total`` steps after which it is evaluated; ``every`` is ``train.eval_every``.

    A fraction divides the stage into equal parts, the nearest whole number of them: 0.25 gives four evaluations.
    """
    if 0 < every < 1:
        parts = min(round(1 / every), total)
        return [round(total * part / parts) for part in range(1, parts + 1)]
    period = int(every) or steps_per_epoch
    return [*range(period, total, period), total]


def _epochs(setup: Setup) -> dict[str, float]:
    return passes(setup.config, batches(setup, 1).steps_per_epoch)


def _sparsities(setup: Setup) -> dict[int, float]:
    """Return the sparsity by step of the re-tuning; step 0 is the stage prune."""
    epochs = _epochs(setup).get("retune", 0.0)
    return pruning.sparsities(setup.config.prune, len(batches(setup, epochs)) if epochs else 0)


def _train(
    session: Session,
    run: Run,
    name: str,
    sparsities: dict[int, float],
    teacher: Callable[[int], Teacher | None] = lambda number: None,
) -> Run:
    """Train a stage, or the rest of it; at each step of ``sparsities`` but 0 the masks are drawn again.

    A stage after a cut that removed all that the run trains is skipped.
    """
    setup, train = run.setup, run.setup.config.train
    if not jax.tree.leaves(start := run.trained or setup.trained):
        session.say(f"{name}: skipped, because the cut removed all that this run trains")
        return run._replace(trained=start)
    stage = training_stage(setup, name)._replace(teacher=teacher)
    total = len(stage.source)
    due = frozenset(evaluations(train.eval_every, total, stage.source.steps_per_epoch))
    score = evaluation.selection_score(setup.data.task)

    def frozen(masks: Masks) -> Any:
        return sharding.place(setup.placed, pruning.freeze(setup, masks))

    def redraw(point: Point, number: int) -> Point:
        if not number or number not in sparsities:
            return point
        masks = pruning.draw(setup, point.state.trained, point.masks, sparsities[number])
        state = point.state._replace(trained=pruning.mask_trained(point.state.trained, masks))
        return point._replace(state=state, frozen=frozen(masks), masks=masks)

    def evaluate(point: Point, done: int) -> tuple[Point, str]:
        metrics = run.programs.evaluate(point.state.trained, point.frozen)
        session.log(name, done, {"metrics": metrics}, offset=stage.offset)
        progress, best = point.progress, point.progress.best
        # Before the last cut the model is not yet as sparse as asked for.
        if done > max(sparsities, default=0):
            progress = progress._replace(evaluations=progress.evaluations + 1, last=metrics)
            if evaluation.finite(metrics):
                lowest = metrics["loss"] if progress.lowest is None else min(metrics["loss"], progress.lowest)
                progress = progress._replace(lowest=lowest)
            if evaluation.finite(metrics) and (best is None or score(metrics) > score(best["metrics"])):
                mark = stage.offset + done
                checkpoints.save_best(session.store, mark, trainer.copy(point.state.trained))
                best = {"mark": mark, "step": done, "metrics": metrics}
        if done == total and best is None:
            finding = f"no evaluation of this stage is finite ({console.line(metrics)})"
            raise trainer.diverged(session, stage, done, stage.rate(done - 1), finding)
        return point._replace(progress=progress._replace(best=best)), console.line(metrics)

    begin = sharding.place(setup.placed, start)
    state = trainer.start(session, run, stage, begin)
    hooks = Hooks(due.__contains__, evaluate, saved=due.__contains__, before=redraw)
    # No name here for the first point: it would keep the first frozen params in memory after a redraw.
    point = trainer.fit(session, run, stage, Point(state, frozen(run.masks), run.masks, run.progress), hooks)
    if point.progress.best is None:  # lost, and no evaluation was left to choose another
        point, _ = evaluate(point, total)
    if point.progress.last is None:  # resumed at the end of a stage that an earlier version trained
        point, _ = evaluate(point, total)
    best: Any = point.progress.best
    trained = checkpoints.restore_best(session.store, best["mark"], begin)
    scores = passed(session, run, trained, point.frozen, name, best["metrics"])
    choice = {"best_step": best["step"], "steps": total, "evaluations": point.progress.evaluations}
    finished = {"name": name, **scores, **choice, "last": point.progress.last}
    trackers.log(session.trackers, trackers.named(f"stage/{name}", scores["metrics"]), stage.offset + total)
    session.say(f"{name}: {console.line(scores['metrics'])}")
    _warn_of_collapse(run, name, best["metrics"], point.progress.lowest)
    progress = point.progress._replace(done=[*point.progress.done, finished])
    return run._replace(trained=trained, masks=point.masks, progress=progress)


def _warn_of_collapse(run: Run, name: str, metrics: dict[str, float], lowest: float | None) -> None:
    """Log a line where the best ``metrics`` of a stage, and the ``lowest`` loss of all its evaluations, are of a model that
    learned nothing."""
    setup, before = run.setup, run.progress.done[0]
    labels = next(iter(setup.data.dev.values())).labels
    losses = {
        # A checkpoint of an earlier version has no lowest loss.
        "lowest": metrics["loss"] if lowest is None else lowest,
        "before": before.get("choose", before["metrics"])["loss"],
    }
    if finding := collapse.finding(setup.data.task, labels, metrics, **losses):
        log.warning("%s", collapse.warning(name, setup.config.train, finding))
