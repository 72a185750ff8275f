"""A run from its config to its files: every stage in turn, resumed where an earlier call stopped.

``tune -> prune -> retune`` or, with EarlyBERT, ``search -> draw -> tune``; then the model, the adapter and ``metrics.json``.
`dsee_jax.train.stages` has the stages, `dsee_jax.train.trainer` the step loop that they share.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsee_jax.ckpt import checkpoints
from dsee_jax.ckpt.folders import CHECKPOINTS, CONFIG, LATENCY, LOG, METRICS, read_json
from dsee_jax.config import CUTTING, Config
from dsee_jax.errors import InputError
from dsee_jax.runtime import console, files, multihost, preemption, storage
from dsee_jax.train import (
    config_file,
    hashes,
    kernels,
    output_dir,
    pruning,
    report,
    results,
    sharding,
    stages,
    target,
    trackers,
)
from dsee_jax.train.programs import make_programs
from dsee_jax.train.setup import Setup, prepare
from dsee_jax.train.trackers import Tracker
from dsee_jax.train.trainer import Progress, Run, Session

log = logging.getLogger(__name__)


def run(
    config: Config, *, say: Callable[[Any], None] = console.show, tracked: Sequence[Tracker] = ()
) -> dict[str, Any]:
    """Do every stage of a run that is not done yet, and return the content of ``metrics.json``.

    The same call again resumes an interrupted run. `dsee_jax.export_run` writes the model of a finished one for other tools.

    Args:
      config: the run, the same on every process of a job (`dsee_jax.runtime.multihost`); ``config.output_dir`` gets all files.
      say: takes the lines and tables for a person; by default they are printed.
      tracked: trackers besides those of ``config.train.trackers``; process 0 calls them.

    Raises:
      InputError: some input cannot work. Nothing has been written then, with three exceptions. A ``prune.target.latency`` that
        is refused leaves the measured times, and a tracker that does not start leaves its own folder; any config may use
        ``output_dir`` after both. A score of pruning that cannot be computed leaves the checkpoints of the stage tune, and
        a call with other keys of ``prune`` goes on from them.
      Diverged: a loss, a metric or a trained value is not finite.
      Preempted: SIGTERM or SIGINT came; the last step is saved, and the same call resumes from it.
    """
    multihost.assert_equal("config", config_file.flat(config))
    with multihost.raise_on_all():
        trackers.check(config)
    setup, timed = prepare(config), config.prune.target.kind == "latency"
    if not timed:
        target.check(setup)
    out = storage.as_path(config.output_dir)
    say = say if multihost.is_main() else lambda text: None
    size = checkpoints.size(setup.trained) + sum(leaf.nbytes for leaf in jax.tree.leaves(setup.params))
    with output_dir.claimed(out, size):
        if finished := multihost.allgather_objects(_finished(out))[0]:
            say(f"{out}: this run is finished; name another output_dir, or delete the folder, to run it again")
            return finished
        if timed:
            # Before any other file: a refused target leaves the times only, for a run with another one.
            say(f"prune.target.latency: times of the widths of the model, measured unless {out / LATENCY} has them")
            target.check(setup)
        inputs, begin = _checked_inputs(setup, config, out)
        # A tracker that does not start leaves a folder that any config may use.
        with trackers.opened(config, begin, tracked) as started:
            _begin(config, out, inputs)
            with preemption.noticed(), checkpoints.opened(out / CHECKPOINTS) as store:
                session = Session(store, out, say, started)
                # No name here holds an earlier run or setup: their params would stay in memory to the end.
                states = [_start(session, setup)]
                setup = setup._replace(params=jax.eval_shape(lambda params: params, setup.params))
                order = stages.names(config)
                for name in order[order.index(states[0].progress.stage) :]:
                    states.append(stages.STAGES[name](session, states.pop()))
            return _finish(session, setup, states.pop())


def _checked_inputs(setup: Setup, config: Config, out: storage.Place) -> tuple[hashes.Hashes, int | None]:
    """Compare the inputs with those of the first call; return their hashes, and the checkpoint that the run goes on from.

    Both are of process 0: ({}, None) on the others.
    """
    with multihost.raise_on_all():
        if not multihost.is_main():
            return {}, None
        inputs = hashes.of_inputs(config, setup.folder, setup.data.task)
        if changed := hashes.check_inputs(config, setup.folder, inputs):
            log.warning("%s", changed)
        return inputs, checkpoints.newest(out / CHECKPOINTS) if config.train.trackers else None


def _begin(config: Config, out: storage.Place, inputs: hashes.Hashes) -> None:
    """Write the files that say how the run is made."""
    with multihost.raise_on_all():
        if multihost.is_main():
            # The mesh may differ from that of an earlier call: the config of the folder follows this one.
            # A permission is of one call.
            kept = dataclasses.replace(config.train, allow_changed_inputs=False)
            files.write_text(out / CONFIG, config_file.dump(dataclasses.replace(config, train=kept)))
            hashes.write(out, inputs)


def _finish(session: Session, setup: Setup, state: Run) -> dict[str, Any]:
    """Write the model, the adapter and ``metrics.json`` of a run after its last stage, and return the figures.

    ``setup`` is that at the start, with the shapes of its params.
    """
    setup, final, trained, masks = results.to_host_layers(setup, state.setup, state.trained, state.masks)
    content, out = {}, session.out
    if multihost.is_main():
        content = results.results(setup, final, trained, masks, state.progress.done)
        content |= results.write(final, trained, masks, out, content)
        content |= cost(state.progress)
        files.flush(out / LOG)
        files.write(out / METRICS, content)
        end = stages.offset(setup, state.progress.stage) + state.progress.step
        trackers.log(session.trackers, trackers.named("final", content | content["final"]), end)
        report.show(content, out, session.say)
    return multihost.allgather_objects(content)[0]


def _finished(out: storage.Place) -> dict[str, Any]:
    """Return the content of ``metrics.json``; {} where the run is not finished, or the file is damaged."""
    if not (out / METRICS).exists():
        return {}
    try:
        return read_json(out / METRICS)
    except InputError as error:
        log.warning("%s: damaged; written again from the last checkpoint", error)
        return {}


def _start(session: Session, setup: Setup) -> Run:
    """Return a run before its first stage, or as of its newest checkpoint."""
    latest = checkpoints.latest(
        session.store, lambda masks: sharding.shardings(setup.placed, {"masks": masks})["masks"]
    )
    order, whole = stages.names(setup.config), setup if setup.config.train.distill.weight else None
    if latest is None:
        files.write_text(session.out / LOG, "")
        progress = Progress(order[0], 0, None, None, [], 0.0, 0, [])
        start = Run(setup, make_programs(setup), setup.trained, {}, progress, whole)
        before = stages.scored(session, start, "before")
        return start._replace(progress=progress._replace(done=[before]))
    progress, masks = Progress(**latest[0]), latest[1]
    if masks and setup.config.prune.kind in CUTTING and progress.stage != "search":
        # Heads and neurons are already cut: these masks name the units that stay.
        setup, masks = pruning.resize(setup, masks), {}
    if progress.stage == "retune":
        setup = kernels.restored(setup, session.out)
    over = [*order[: order.index(progress.stage)], *(stage["name"] for stage in progress.done)]
    files.rewind(session.out / LOG, over, progress.stage, progress.step)
    session.say(f"{session.out}: resuming at step {progress.step} of stage {progress.stage}")
    return Run(setup, make_programs(setup), None, masks, progress, whole)


def cost(progress: Progress) -> dict[str, Any]:
    """Return the cost of a run: seconds of training, tokens per second, and the peak memory in bytes (`peak_memory`)."""
    return {
        "train_seconds": progress.seconds,
        "train_tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int:
    """Return the most bytes in use so far: of the device where it counts them, else of the process; 0 where neither does."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such count
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
