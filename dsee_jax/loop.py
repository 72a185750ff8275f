"""A run: tune -> prune -> retune -> evaluate -> export, from a config; run again it continues where it stopped."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsee_jax import config as configs
from dsee_jax import cut, evaluation, export, journal, metrics, optim, report, sharding
from dsee_jax import step as steps
from dsee_jax.aliases import Masks
from dsee_jax.ckpt import state as checkpoints
from dsee_jax.config import Config
from dsee_jax.data.batches import Batches, iterate, micro_batches
from dsee_jax.setup import CONFIG, Setup, keys, prepare

LOG, METRICS = "metrics.jsonl", "metrics.json"
LOG_EVERY = 10
"""Steps between log lines: reading a loss waits for the device."""


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


def run(config: Config, *, say: Callable[[Any], None] = print) -> dict[str, Any]:
    """Run every stage of a config, or what is left of them, and return what ``metrics.json`` holds.

    Args:
      config: the run; ``config.output_dir`` gets all files.
      say: takes the lines and tables that a person reads.

    Raises:
      InputError: something of the input cannot work; nothing has been written then.
    """
    setup = prepare(config)
    out = Path(config.output_dir)
    if (out / METRICS).exists():
        say(f"{out}: this run is finished; name another output_dir, or delete the folder, to run it again")
        return json.loads((out / METRICS).read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    if not (out / CONFIG).exists():
        journal.write_text(out / CONFIG, configs.dump(config))
    with checkpoints.opened(out / "checkpoints") as store:
        final, trained, masks, progress = _stages(setup, store, out, say)
    results = export.results(setup, final, trained, masks, progress.done)
    results |= export.write(final, trained, masks, out)
    results |= cost(progress)
    journal.write(out / METRICS, results)
    report.final(results, out, say)
    return results


def cost(progress: Progress) -> dict[str, Any]:
    """Return what the run took: seconds of training, tokens a second, the peak memory of the process in bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "train_seconds": progress.seconds,
        "train_tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": stats.get("peak_bytes_in_use", kilobytes * 1024),
    }


def stages(setup: Setup) -> list[Stage]:
    """Return the stages of training of a run, in order."""
    train = setup.config.train
    tune = Stage("tune", train.epochs, train.learning_rate, 0)
    if setup.config.prune.kind == "none" or not train.retune_epochs:
        return [tune]
    rate = train.retune_learning_rate or train.learning_rate
    return [tune, Stage("retune", train.retune_epochs, rate, len(batches(setup, train.epochs)) + 1)]


def batches(setup: Setup, epochs: float) -> Batches:
    """Return the training batches of so many epochs, by step."""
    train = setup.config.train
    return Batches(setup.data.train, train.batch_size, epochs=epochs, seed=train.seed, edges=setup.data.edges)


class Programs(NamedTuple):
    """What is compiled, once for all stages."""

    optimizer: optax.GradientTransformation
    step: Callable[..., tuple[steps.State, jax.Array]]
    evaluate: Callable[[dict[str, Any], Masks], dict[str, float]]


def programs(setup: Setup) -> Programs:
    """Return the jitted functions of a run."""
    config = setup.config
    optimizer = optim.adamw(config.train)
    step = steps.train_step(
        setup.model,
        optimizer,
        config.delta,
        regression=setup.data.task.regression,
        parts=lambda batch: micro_batches(
            batch["input_ids"].shape[0], batch["input_ids"].shape[1], config.data.batch_tokens
        ),
    )
    score = evaluation.evaluator(setup.model, config, setup.data, setup.mesh)
    return Programs(
        optimizer, jax.jit(step, donate_argnums=0), lambda trained, masks: score(trained, cut.freeze(setup, masks))
    )


def _stages(
    setup: Setup, store: checkpoints.Store, out: Path, say: Callable[[Any], None]
) -> tuple[Setup, Any, Masks, Progress]:
    """Do what is left of the stages; return the setup as cut, what was trained, the masks and the record of it all."""
    compiled, pruning = programs(setup), setup.config.prune
    plan = {stage.name: stage for stage in stages(setup)}
    trained, masks, found = None, {}, checkpoints.latest(store)

    def scored(name: str, trained: dict[str, Any], masks: Masks) -> dict[str, Any]:
        found = compiled.evaluate(trained, masks)
        journal.append(out / LOG, {"stage": name, "step": 0, "metrics": found})
        say(f"{name}: {report.line(found)}")
        return {"name": name, "metrics": found}

    if found is None:
        journal.write_text(out / LOG, "")
        trained = setup.trained
        progress = Progress("tune", 0, None, None, [scored("before", trained, {})], 0.0, 0)
    else:
        progress, masks = Progress(**found[0]), found[1]
        if masks and pruning.kind == "structured":
            setup, masks = cut.smaller(setup, masks), {}
            compiled = programs(setup)
        journal.rewind(out / LOG, [stage["name"] for stage in progress.done], progress.stage, progress.step)
        say(f"{out}: going on at step {progress.step} of stage {progress.stage}")
    for name in list(plan)[list(plan).index(progress.stage) :]:
        trained, masks, progress = fit(setup, compiled, plan[name], trained, masks, progress, store, out)
        say(f"{name}: {report.line(progress.done[-1]['metrics'])}")
        if name == "tune" and pruning.kind != "none":
            total = len(batches(setup, plan["retune"].epochs)) if "retune" in plan else 0
            masks = cut.draw(setup, trained, {}, cut.sparsities(pruning, total)[0])
            setup, trained, masks = cut.carry_out(setup, trained, masks)
            # A smaller model is another program.
            compiled = programs(setup) if setup.kept else compiled
            done = [*progress.done, scored("prune", trained, masks)]
            progress = progress._replace(stage="retune", step=0, data=None, best=None, done=done)
    return setup, trained, masks, progress


def fit(
    setup: Setup,
    compiled: Programs,
    stage: Stage,
    trained: dict[str, Any] | None,
    masks: Masks,
    progress: Progress,
    store: checkpoints.Store,
    out: Path,
) -> tuple[dict[str, Any], Masks, Progress]:
    """Train one stage, or the rest of it, and return what was trained at its best evaluation.

    ``trained`` is what the stage starts from, or None to go on from the newest checkpoint, whose record ``progress`` is.
    """
    train, source = setup.config.train, batches(setup, stage.epochs)
    total = len(source)
    rate = optim.schedule(stage.learning_rate, total, train.warmup)
    begin = sharding.copy(setup.mesh, trained or setup.trained)
    state = steps.State(jnp.zeros((), jnp.int32), _copy(begin), compiled.optimizer.init(begin))
    if trained is None:
        state = checkpoints.restore(store, state)
    else:
        checkpoints.save(store, stage.offset, _copy(state), setup.kept or masks, progress._asdict())
    frozen = sharding.copy(setup.mesh, cut.freeze(setup, masks))
    prunings = cut.sparsities(setup.config.prune, total) if stage.name == "retune" else {}
    period = train.eval_every or source.steps_per_epoch
    evaluations = {*range(period, total, period), total}
    every = train.checkpoint_every or total
    metric = next(iter(metrics.of_task(setup.config.data.task, regression=setup.data.task.regression)))
    key = jax.random.fold_in(keys(train.seed)["dropout"], stage.offset)
    stream = iterate(source)
    if progress.data is not None:
        stream.set_state(progress.data)
    pending: list[tuple[jax.Array, int]] = []
    tick = time.perf_counter()
    with report.bar(stage.name, progress.step, total) as advance:
        for number in range(progress.step, total):
            if number in prunings and number:
                masks = cut.draw(setup, state.trained, masks, prunings[number])
                state = state._replace(trained=cut.masked(state.trained, masks))
                frozen = sharding.copy(setup.mesh, cut.freeze(setup, masks))
            batch = next(stream)
            state, loss = compiled.step(state, frozen, sharding.split(setup.mesh, batch), key, rate(number))
            pending.append((loss, int(batch["attention_mask"].sum(1) @ batch["weights"])))
            done = number + 1
            if done % LOG_EVERY == 0 or done in evaluations or done % every == 0:
                mean = float(np.mean([float(loss) for loss, _ in pending]))
                seconds, count = time.perf_counter() - tick, sum(count for _, count in pending)
                record = {"stage": stage.name, "step": done, "loss": mean, "learning_rate": float(rate(number))}
                journal.append(out / LOG, record | {"tokens_per_second": count / seconds})
                progress = progress._replace(seconds=progress.seconds + seconds, tokens=progress.tokens + count)
                pending.clear()
                advance(done, f"loss {mean:.4f}")
                tick = time.perf_counter()
            if done in evaluations:
                found = compiled.evaluate(state.trained, masks)
                journal.append(out / LOG, {"stage": stage.name, "step": done, "metrics": found})
                # Until the last cut is made the model is not yet the one asked for.
                ready = done > max(prunings, default=0)
                if ready and (progress.best is None or found[metric] > progress.best["metrics"][metric]):
                    mark = stage.offset + done
                    checkpoints.save_best(store, mark, _copy(state.trained))
                    progress = progress._replace(best={"mark": mark, "step": done, "metrics": found})
                advance(done, report.line(found))
                tick = time.perf_counter()
            if done in evaluations or done % every == 0:
                progress = progress._replace(step=done, data=stream.get_state())
                checkpoints.save(store, stage.offset + done, _copy(state), setup.kept or masks, progress._asdict())
    best: Any = progress.best
    finished = {"name": stage.name, "metrics": best["metrics"], "best_step": best["step"], "steps": total}
    progress = progress._replace(done=[*progress.done, finished])
    return checkpoints.restore_best(store, best["mark"], begin), masks, progress


def _copy(values: Any) -> Any:
    """Copy what is saved in the background: on the CPU Orbax reads the very buffers that the next step is given to reuse."""
    return jax.tree.map(jnp.copy, values)
