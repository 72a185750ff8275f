"""The step loop of every stage that trains: batches, steps, log lines, checkpoints and SIGTERM; hooks do the rest."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsee_jax.ckpt import checkpoints
from dsee_jax.ckpt.folders import LOG
from dsee_jax.data.batches import Batches, count_tokens, iterate
from dsee_jax.errors import Diverged
from dsee_jax.runtime import console, files, preemption
from dsee_jax.runtime.storage import Place
from dsee_jax.train import sharding, trackers
from dsee_jax.train.optim import Schedule
from dsee_jax.train.programs import Programs
from dsee_jax.train.setup import Setup, keys
from dsee_jax.train.step import Frozen, State, Teacher
from dsee_jax.train.trackers import Tracker
from dsee_jax.typing import Masks

LOG_EVERY = 10
"""Steps between log lines: reading a loss waits for the device."""


class Session(NamedTuple):
    """The outputs of a run, the same in all of its stages."""

    store: checkpoints.Store
    out: Place  # the folder of the run
    say: Callable[[Any], None]  # takes the lines for a person
    trackers: tuple[Tracker, ...] = ()  # of process 0

    def log(self, stage: str, step: int, figures: dict[str, Any], *, offset: int) -> None:
        """Add a line to the log of the run, and pass its numbers to the trackers; ``offset`` as in `Stage`."""
        files.append(self.out / LOG, {"stage": stage, "step": step, **figures})
        trackers.log(self.trackers, trackers.scalars(figures), offset + step)


class Progress(NamedTuple):
    """The record of a run so far; each checkpoint keeps it as JSON, beside the state and the masks."""

    stage: str  # the training stage that the state belongs to
    step: int  # steps done in this stage
    data: Any  # the state of its data iterator; None at step 0
    best: dict[str, Any] | None  # {"mark", "step", "metrics"} of its best evaluation
    done: list[dict[str, Any]]  # {"name", "metrics"} of the finished stages
    seconds: float  # of training so far
    tokens: int  # trained on so far, without padding
    distances: list[dict[str, float]]  # between the masks of consecutive checks of a search, `earlybert.distance`
    evaluations: int = 0  # of this stage so far, among which ``best`` is chosen
    last: dict[str, float] | None = None  # the metrics of the newest of them
    lowest: float | None = None  # the lowest loss of them


class Run(NamedTuple):
    """A run between two stages."""

    setup: Setup  # with the model as it is now: smaller once heads and neurons are cut
    programs: Programs
    trained: Any  # the start of the next stage; None: resume from the newest checkpoint, whose record is ``progress``
    masks: Masks  # of the pruned weights; after a search, the units that stay
    progress: Progress
    whole: Setup | None = None  # as before pruning, for the teacher of a distillation; None: the run has none


class Stage(NamedTuple):
    """One stage of training."""

    name: str
    source: Batches
    rate: Schedule
    offset: int  # the number of its step 0 among the checkpoints of the run
    teacher: Callable[[int], Teacher | None] = lambda number: None  # the teacher of a step


class Point(NamedTuple):
    """The loop between two steps."""

    state: State
    frozen: Frozen
    masks: Masks  # saved with each checkpoint
    progress: Progress


class Hooks(NamedTuple):
    """The differences between the stages of training; ``done`` counts the finished steps of the stage."""

    due: Callable[[int], bool]  # done -> whether to visit
    visit: Callable[[Point, int], tuple[Point, str]]  # (point, done) -> (point, note beside the progress bar)
    # done -> whether to save, besides every ``train.checkpoint_every`` steps and at the end of the stage
    saved: Callable[[int], bool] = lambda done: False
    before: Callable[[Point, int], Point] = lambda point, number: point  # before step ``number``
    over: Callable[[Progress], bool] = lambda progress: False  # whether a visit has ended the stage


def start(session: Session, run: Run, stage: Stage, trained: dict[str, Any]) -> State:
    """Return the first state of a stage, already saved; where ``run`` resumes, the state of the newest checkpoint."""

    def first(trained: dict[str, Any]) -> State:
        return State(jnp.zeros((), jnp.int32), copy(trained), run.programs.optimizer.init(trained))

    where = sharding.shardings(run.setup.placed, jax.eval_shape(first, trained))
    state = jax.jit(first, out_shardings=where)(trained)  # one program instead of one for each shape
    if run.trained is None:
        return checkpoints.restore(session.store, state)
    masks = run.setup.kept or run.masks
    checkpoints.save(session.store, stage.offset, copy(state), masks, run.progress._asdict())
    return state


def fit(session: Session, run: Run, stage: Stage, point: Point, hooks: Hooks) -> Point:
    """Do the steps of a stage from ``point`` on, and return the point after the last one.

    Raises:
      Preempted: SIGTERM or SIGINT came; the step during which it came is finished and saved.
      Diverged: a loss or a value of the state is not finite. Losses are read at log lines, and the state is checked where it
        is evaluated or saved, so that no step waits for the device and no checkpoint holds such values.
    """
    setup, total = run.setup, len(stage.source)
    every = setup.config.train.checkpoint_every or total
    key = jax.random.fold_in(keys(setup.config.train.seed)["dropout"], stage.offset)
    stream: Any = iterate(stage.source)
    if point.progress.data is not None:
        stream.set_state(point.progress.data)
    pending: list[_Pending] = []
    tick = time.perf_counter()
    with console.bar(stage.name, point.progress.step, total) as advance:
        for number in range(point.progress.step, total):
            if hooks.over(point.progress):
                break
            point = hooks.before(point, number)
            batch, rate = next(stream), stage.rate(number)
            rows = sharding.split(setup.placed.mesh, batch)
            state, loss = run.programs.step(point.state, point.frozen, rows, key, rate, stage.teacher(number))
            pending.append(_Pending(loss, count_tokens(batch), number + 1, rate))
            done, stopping = number + 1, preemption.asked()
            point = point._replace(state=state, progress=point.progress._replace(step=done))
            due, saving = hooks.due(done), hooks.saved(done) or done % every == 0 or done == total or stopping
            if done % LOG_EVERY == 0 or due or saving:
                _check(session, stage, pending, point.state if due or saving else None)
                figures, progress = _read(pending, tick, point.progress)
                record = {"loss": figures[0], "learning_rate": float(rate), "tokens_per_second": figures[1]}
                session.log(stage.name, done, record, offset=stage.offset)
                advance(done, f"loss {figures[0]:.4f}")
                point, tick = point._replace(progress=progress), time.perf_counter()
            if due:
                point, note = hooks.visit(point, done)
                advance(done, note)
                if not console.draws_bars():
                    session.say(f"{stage.name}, step {done} of {total}: {note}")
                tick = time.perf_counter()
            if saving or hooks.over(point.progress):
                point = point._replace(progress=point.progress._replace(data=stream.get_state()))
                files.flush(session.out / LOG)
                checkpoint = (copy(point.state), setup.kept or point.masks, point.progress._asdict())
                checkpoints.save(session.store, stage.offset + done, *checkpoint)
            if stopping:
                raise preemption.stopped(f"step {done} of {total} of stage {stage.name}")
    return point


class _Pending(NamedTuple):
    """A step whose loss is not read yet."""

    loss: jax.Array
    tokens: int
    step: int
    rate: float | np.float32


def diverged(session: Session, stage: Stage, step: int, rate: Any, finding: str) -> Diverged:
    """Return the error that ends a stage at ``step``, with the learning rate ``rate``, because of ``finding``."""
    # Every stage begins with a checkpoint.
    saved = (session.store.last.latest_step() or stage.offset) - stage.offset
    return Diverged(
        f"stage {stage.name}, step {step}, learning rate {float(rate):g}: {finding}; the last good checkpoint is of step "
        f"{saved}, from where the same command resumes; to train with a lower train.learning_rate, name another output_dir"
    )


def _check(session: Session, stage: Stage, pending: list[_Pending], state: State | None) -> None:
    """Raise `Diverged` for the first loss that is not finite, or a ``state`` with such values after the last step."""
    for each in pending:
        if not math.isfinite(loss := float(each.loss)):
            raise diverged(session, stage, each.step, each.rate, f"the training loss is {loss}")
    if state is not None and not _finite(state):
        raise diverged(session, stage, pending[-1].step, pending[-1].rate, "the trained values are not finite")


@jax.jit
def _finite(state: State) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _read(pending: list[_Pending], tick: float, progress: Progress) -> tuple[tuple[float, float], Progress]:
    """Return (mean loss, tokens per second) since the last log line, and progress with the time and tokens added.

    Reading the losses waits for the device; ``pending`` is empty afterwards.
    """
    loss = float(np.mean([float(each.loss) for each in pending]))
    seconds, tokens = time.perf_counter() - tick, sum(each.tokens for each in pending)
    pending.clear()
    progress = progress._replace(seconds=progress.seconds + seconds, tokens=progress.tokens + tokens)
    return (loss, tokens / seconds), progress


def copy(values: Any) -> Any:
    """Copy a tree that is saved in the background: on the CPU Orbax reads the very buffers that the next step reuses."""
    return jax.tree.map(jnp.copy, values)
