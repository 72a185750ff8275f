"""The stages of a run that train: the search for a ticket, tuning, re-tuning; each resumes where its last checkpoint is."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsee_jax import models
from dsee_jax.ckpt import checkpoints
from dsee_jax.ckpt.folders import LOG
from dsee_jax.config import Config
from dsee_jax.data.batches import Batches, count, iterate, micro_batches
from dsee_jax.prune import earlybert
from dsee_jax.runtime import console, files, preemption
from dsee_jax.runtime.storage import Place
from dsee_jax.train import evaluation, optim, pruning, sharding
from dsee_jax.train.setup import Setup, keys
from dsee_jax.train.step import State, train_step
from dsee_jax.typing import Masks

LOG_EVERY = 10
"""Steps between log lines: reading a loss waits for the device."""
CHECKS = 10
"""Of the mask in a search, where the config does not say how often."""


class Stage(NamedTuple):
    """One stage of training."""

    name: str
    epochs: float
    learning_rate: float
    offset: int  # what its step 0 is numbered among the checkpoints of the run


class Progress(NamedTuple):
    """How far a run has come; kept with each checkpoint as JSON, beside the state and the masks."""

    stage: str  # the stage of training that the state belongs to
    step: int  # steps done in it
    data: Any  # the state of its data iterator; None at step 0
    best: dict[str, Any] | None  # {"mark", "step", "metrics"} of its best evaluation
    done: list[dict[str, Any]]  # {"name", "metrics"} of the stages that are finished
    seconds: float  # spent training so far
    tokens: int  # trained on so far, padding not counted
    distances: list[dict[str, float]]  # of the masks of consecutive checks of a search, `tickets.distance`


class Programs(NamedTuple):
    """What is compiled, once for all stages that train one model."""

    optimizer: optax.GradientTransformation
    step: Callable[..., tuple[State, jax.Array]]
    evaluate: Callable[[dict[str, Any], Masks], dict[str, float]]
    write: Callable[[dict[str, Any], Masks], dict[str, float]]  # scores of written texts; none where none are asked for


def step(
    model: Any, optimizer: optax.GradientTransformation, config: Config, placed: sharding.Placement, **options: Any
) -> Callable[..., tuple[State, jax.Array]]:
    """Return `dsee_jax.train.step.train_step` of a config over the mesh of ``placed``, not yet compiled."""

    def parts(batch: Any) -> int:
        rows, length = batch["input_ids"].shape
        return micro_batches(rows, length, config.data.batch_tokens)

    one = train_step(
        model,
        optimizer,
        config.delta,
        parts=parts,
        joined=placed.mesh.shape["tensor"] == 1,
        **options,
    )

    def divided(state: State, *args: Any) -> tuple[State, jax.Array]:
        with sharding.rows_divided(placed.mesh):
            new, loss = one(state, *args)
        # What a step changes stays where it is.
        return jax.lax.with_sharding_constraint(new, sharding.shardings(placed, new)), loss

    return divided


def programs(setup: Setup, *, searching: bool = False) -> Programs:
    """Return the jitted functions of a run; ``searching`` trains coefficients of heads and neurons as well."""
    config, optimizer = setup.config, optim.adamw(setup.config.train)
    options = {"cuts": models.cuts(setup.model), "penalty": config.prune.penalty} if searching else {}
    run = step(setup.model, optimizer, config, setup.placed, regression=setup.data.task.regression, **options)
    score = evaluation.evaluator(setup.model, config, setup.data, setup.placed)
    write = evaluation.writer(setup.model, config, setup.data, setup.placed)
    return Programs(
        optimizer,
        jax.jit(run, donate_argnums=0),
        lambda trained, masks: score(trained, pruning.freeze(setup, masks)),
        lambda trained, masks: write(trained, pruning.freeze(setup, masks)),
    )


def stages(setup: Setup) -> list[Stage]:
    """Return the stages of training of a run, in order."""
    train, prune = setup.config.train, setup.config.prune
    tune = Stage("tune", train.epochs, train.learning_rate, 0)
    if prune.kind == "earlybert":
        search = tune._replace(name="search", epochs=prune.search)
        return [search, tune._replace(offset=len(batches(setup, search.epochs)) + 1)]
    if prune.kind == "none" or not train.retune_epochs:
        return [tune]
    rate = train.retune_learning_rate or train.learning_rate
    return [tune, Stage("retune", train.retune_epochs, rate, len(batches(setup, train.epochs)) + 1)]


def batches(setup: Setup, epochs: float) -> Batches:
    """Return the training batches of so many epochs, by step."""
    train = setup.config.train
    return Batches(setup.data.train, train.batch_size, epochs=epochs, seed=train.seed, edges=setup.data.edges)


def fit(
    setup: Setup,
    compiled: Programs,
    stage: Stage,
    trained: dict[str, Any] | None,
    masks: Masks,
    progress: Progress,
    store: checkpoints.Store,
    out: Place,
) -> tuple[dict[str, Any], Masks, Progress]:
    """Train one stage, or the rest of it, and return what was trained at its best evaluation.

    ``trained`` is what the stage starts from, or None to go on from the newest checkpoint, whose record ``progress`` is.
    Raises `Preempted` after the step at which SIGTERM came, when that step is saved.
    """
    train, source = setup.config.train, batches(setup, stage.epochs)
    total = len(source)
    rate = optim.schedule(stage.learning_rate, total, train.warmup)
    begin = sharding.place(setup.placed, trained or setup.trained)
    state = _begin(compiled, setup.placed, begin, store, stage, setup.kept or masks, progress, resumed=trained is None)
    frozen = sharding.place(setup.placed, pruning.freeze(setup, masks))
    prunings = pruning.sparsities(setup.config.prune, total) if stage.name == "retune" else {}
    period = train.eval_every or source.steps_per_epoch
    evaluations = {*range(period, total, period), total}
    every = train.checkpoint_every or total
    merit = evaluation.selection_score(setup.data.task)
    key, stream = _dropout(train.seed, stage), _stream(source, progress)
    pending: list[tuple[jax.Array, int]] = []
    tick = time.perf_counter()
    with console.bar(stage.name, progress.step, total) as advance:
        for number in range(progress.step, total):
            if number in prunings and number:
                masks = pruning.draw(setup, state.trained, masks, prunings[number])
                state = state._replace(trained=pruning.masked(state.trained, masks))
                frozen = sharding.place(setup.placed, pruning.freeze(setup, masks))
            batch = next(stream)
            state, loss = compiled.step(state, frozen, sharding.split(setup.placed.mesh, batch), key, rate(number))
            pending.append((loss, count(batch)))
            done, stopping = number + 1, preemption.asked()
            if done % LOG_EVERY == 0 or done in evaluations or done % every == 0 or stopping:
                progress = _log(out, stage, done, rate(number), pending, tick, progress, advance)
                tick = time.perf_counter()
            if done in evaluations:
                found = compiled.evaluate(state.trained, masks)
                files.append(out / LOG, {"stage": stage.name, "step": done, "metrics": found})
                # Until the last cut is made the model is not yet the one asked for.
                ready = done > max(prunings, default=0)
                if ready and (progress.best is None or merit(found) > merit(progress.best["metrics"])):
                    mark = stage.offset + done
                    checkpoints.save_best(store, mark, _copy(state.trained))
                    progress = progress._replace(best={"mark": mark, "step": done, "metrics": found})
                advance(done, console.line(found))
                tick = time.perf_counter()
            if done in evaluations or done % every == 0 or stopping:
                progress = progress._replace(step=done, data=stream.get_state())
                files.flush(out / LOG)
                checkpoints.save(store, stage.offset + done, _copy(state), setup.kept or masks, progress._asdict())
            if stopping:
                raise preemption.Preempted(f"step {done} of {total} of stage {stage.name}")
    best: Any = progress.best
    kept = checkpoints.restore_best(store, best["mark"], begin)
    found = compiled.write(kept, masks) | best["metrics"]
    finished = {"name": stage.name, "metrics": found, "best_step": best["step"], "steps": total}
    return kept, masks, progress._replace(done=[*progress.done, finished])


def search(
    setup: Setup,
    compiled: Programs,
    stage: Stage,
    kept: Masks,
    progress: Progress,
    store: checkpoints.Store,
    out: Place,
    *,
    resumed: bool,
) -> tuple[Masks, Progress]:
    """Search for a ticket (EarlyBERT, arXiv 2101.00063, section 3), or do the rest of it; return the units that it keeps.

    What the run trains is trained together with a coefficient for every head and neuron, under the L1 penalty. The rate
    stays where the warm-up brings it: were it to fall, the mask would come to rest for that alone. The ticket is the mask of
    the last step or, where ``prune.tolerance`` is above 0, the mask that stopped moving. Of what was trained nothing is kept.

    Args:
      kept: of the last check, where the search is resumed.
      resumed: go on from the newest checkpoint, whose record ``progress`` is.
    """
    train, prune, source = setup.config.train, setup.config.prune, batches(setup, stage.epochs)
    total = len(source)
    rate = optim.warmed(stage.learning_rate, total, train.warmup)
    period = prune.check_every or max(total // CHECKS, 1)
    every = train.checkpoint_every or total
    coefficients = earlybert.init(models.cuts(setup.model), setup.params)
    begin = sharding.place(setup.placed, setup.trained | {"coefficients": coefficients})
    state = _begin(compiled, setup.placed, begin, store, stage, kept, progress, resumed=resumed)
    frozen = sharding.place(setup.placed, pruning.freeze(setup, {}))
    key, stream = _dropout(train.seed, stage), _stream(source, progress)
    pending: list[tuple[jax.Array, int]] = []
    tick = time.perf_counter()
    with console.bar(stage.name, progress.step, total) as advance:
        for number in range(progress.step, total):
            # Where a checkpoint has the last check and no more, the search was over.
            if _settled(prune, progress):
                break
            batch = next(stream)
            state, loss = compiled.step(state, frozen, sharding.split(setup.placed.mesh, batch), key, rate(number))
            pending.append((loss, count(batch)))
            done, stopping = number + 1, preemption.asked()
            checked = done % period == 0 or done == total
            if done % LOG_EVERY == 0 or checked or done % every == 0 or stopping:
                progress = _log(out, stage, done, rate(number), pending, tick, progress, advance)
                tick = time.perf_counter()
            if checked:
                learned = jax.device_get(state.trained["coefficients"])
                before, kept = kept, earlybert.draw(learned, heads=prune.heads, neurons=prune.neurons)
                moved = earlybert.distance(before, kept) if before else {}
                record = {"coefficients": earlybert.summary(learned), "kept": earlybert.packed(kept), "distance": moved}
                files.append(out / LOG, {"stage": stage.name, "step": done, **record})
                progress = progress._replace(distances=[*progress.distances, moved] if moved else progress.distances)
            progress = progress._replace(step=done)
            if done % every == 0 or done == total or stopping:
                progress = progress._replace(data=stream.get_state())
                files.flush(out / LOG)
                checkpoints.save(store, stage.offset + done, _copy(state), kept, progress._asdict())
            if stopping:
                raise preemption.Preempted(f"step {done} of {total} of stage {stage.name}")
    return kept, progress


def _settled(pruning: Any, progress: Progress) -> bool:
    return earlybert.settled(progress.distances, tolerance=pruning.tolerance, patience=pruning.patience)


def _begin(
    compiled: Programs,
    placed: sharding.Placement,
    trained: dict[str, Any],
    store: checkpoints.Store,
    stage: Stage,
    masks: Masks,
    progress: Progress,
    *,
    resumed: bool,
) -> State:
    """Return the state that a stage starts from, after it was saved, or the one of the newest checkpoint."""
    state = State(jnp.zeros((), jnp.int32), _copy(trained), compiled.optimizer.init(trained))
    state = sharding.place(placed, state)
    if resumed:
        return checkpoints.restore(store, state)
    checkpoints.save(store, stage.offset, _copy(state), masks, progress._asdict())
    return state


def _dropout(seed: int, stage: Stage) -> jax.Array:
    return jax.random.fold_in(keys(seed)["dropout"], stage.offset)


def _stream(source: Batches, progress: Progress) -> Any:
    stream = iterate(source)
    if progress.data is not None:
        stream.set_state(progress.data)
    return stream


def _log(
    out: Place,
    stage: Stage,
    done: int,
    rate: Any,
    pending: list[tuple[jax.Array, int]],
    tick: float,
    progress: Progress,
    advance: Callable[[int, str], None],
) -> Progress:
    """Log the mean loss since the last line, which waits for the device; return progress with the time and tokens added."""
    mean = float(np.mean([float(loss) for loss, _ in pending]))
    seconds, tokens = time.perf_counter() - tick, sum(tokens for _, tokens in pending)
    pending.clear()
    record = {"stage": stage.name, "step": done, "loss": mean, "learning_rate": float(rate)}
    files.append(out / LOG, record | {"tokens_per_second": tokens / seconds})
    advance(done, f"loss {mean:.4f}")
    return progress._replace(seconds=progress.seconds + seconds, tokens=progress.tokens + tokens)


def _copy(values: Any) -> Any:
    """Copy what is saved in the background: on the CPU Orbax reads the very buffers that the next step is given to reuse."""
    return jax.tree.map(jnp.copy, values)
