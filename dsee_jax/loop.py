"""A run: tune -> prune -> retune -> evaluate -> export, from a config; run again it continues where it stopped.

With EarlyBERT: search -> draw -> tune -> evaluate -> export.
"""

import dataclasses
import json
import pathlib
import resource
from collections.abc import Callable
from typing import Any

import jax

from dsee_jax import config as configs
from dsee_jax import cut, export, journal, preemption, processes, report, sharding, stores, training, tree
from dsee_jax.aliases import Masks
from dsee_jax.ckpt import state as checkpoints
from dsee_jax.config import CUTTING, Config
from dsee_jax.setup import CONFIG, Setup, prepare
from dsee_jax.stores import Place
from dsee_jax.training import LOG, Progress

METRICS = "metrics.json"


def run(config: Config, *, say: Callable[[Any], None] = print) -> dict[str, Any]:
    """Run every stage of a config, or what is left of them, and return what ``metrics.json`` holds.

    Args:
      config: the run, the same on every process of a job (`dsee_jax.processes`); ``config.output_dir`` gets all files.
      say: takes the lines and tables that a person reads.

    Raises:
      InputError: something of the input cannot work; nothing has been written then.
      Preempted: SIGTERM came; the last step is saved, and the same call goes on from it.
    """
    settings = tree.flatten(dataclasses.asdict(config))
    processes.agree("config", {path.replace("/", "."): value for path, value in settings.items()})
    setup = prepare(config)
    out = stores.place(config.output_dir)
    say = say if processes.first() else lambda text: None
    if processes.everyone((out / METRICS).exists())[0]:
        say(f"{out}: this run is finished; name another output_dir, or delete the folder, to run it again")
        return json.loads((out / METRICS).read_text(encoding="utf-8"))
    if processes.first() and isinstance(out, pathlib.Path):  # a store has no folders but those of its files
        out.mkdir(parents=True, exist_ok=True)
    # Another mesh than that of the beginning goes on with the same run.
    journal.write_text(out / CONFIG, configs.dump(config))
    processes.together("the folder of the run is there")
    with preemption.noticed(), checkpoints.opened(out / "checkpoints") as store:
        final, trained, masks, progress = _stages(setup, store, out, say)
    setup, final, trained, masks = export.apart(setup, final, trained, masks)
    results = {}
    if processes.first():
        results = export.results(setup, final, trained, masks, progress.done)
        results |= export.write(final, trained, masks, out)
        results |= cost(progress)
        journal.flush(out / LOG)
        journal.write(out / METRICS, results)
        report.final(results, out, say)
    return processes.everyone(results)[0]


def cost(progress: Progress) -> dict[str, Any]:
    """Return what the run took: seconds of training, tokens a second, the peak memory of the process in bytes."""
    stats = jax.local_devices()[0].memory_stats() or {}
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "train_seconds": progress.seconds,
        "train_tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": stats.get("peak_bytes_in_use", kilobytes * 1024),
    }


def _stages(
    setup: Setup, store: checkpoints.Store, out: Place, say: Callable[[Any], None]
) -> tuple[Setup, Any, Masks, Progress]:
    """Do what is left of the stages; return the setup as cut, what was trained, the masks and the record of it all."""
    pruning, plan = setup.config.prune, {stage.name: stage for stage in training.stages(setup)}
    compiled = training.programs(setup)
    trained, masks = None, {}
    found = checkpoints.latest(store, lambda masks: sharding.shardings(setup.placed, {"masks": masks})["masks"])

    def scored(name: str, trained: dict[str, Any], masks: Masks) -> dict[str, Any]:
        found = compiled.write(trained, masks) | compiled.evaluate(trained, masks)
        journal.append(out / LOG, {"stage": name, "step": 0, "metrics": found})
        say(f"{name}: {report.line(found)}")
        return {"name": name, "metrics": found}

    if found is None:
        journal.write_text(out / LOG, "")
        trained = setup.trained
        progress = Progress(next(iter(plan)), 0, None, None, [scored("before", trained, {})], 0.0, 0, [])
    else:
        progress, masks = Progress(**found[0]), found[1]
        if masks and pruning.kind in CUTTING and progress.stage != "search":
            setup, masks = cut.smaller(setup, masks), {}
            compiled = training.programs(setup)
        over = list(plan)[: list(plan).index(progress.stage)]
        over += [stage["name"] for stage in progress.done]
        journal.rewind(out / LOG, over, progress.stage, progress.step)
        say(f"{out}: going on at step {progress.step} of stage {progress.stage}")
    for name in list(plan)[list(plan).index(progress.stage) :]:
        if name == "search":
            searching = training.programs(setup, searching=True)
            kept, progress = training.search(
                setup, searching, plan[name], masks, progress, store, out, resumed=trained is None
            )
            setup, masks = cut.smaller(setup, kept), {}
            trained, compiled = setup.trained, training.programs(setup)
            drawn = scored("draw", trained, masks) | {"steps": progress.step}
            progress = progress._replace(stage="tune", step=0, data=None, done=[*progress.done, drawn])
            continue
        trained, masks, progress = training.fit(setup, compiled, plan[name], trained, masks, progress, store, out)
        say(f"{name}: {report.line(progress.done[-1]['metrics'])}")
        if name == "tune" and pruning.kind not in ("none", "earlybert"):
            total = len(training.batches(setup, plan["retune"].epochs)) if "retune" in plan else 0
            masks = cut.draw(setup, trained, {}, cut.sparsities(pruning, total)[0])
            setup, trained, masks = cut.carry_out(setup, trained, masks)
            # A smaller model is another program.
            compiled = training.programs(setup) if setup.kept else compiled
            done = [*progress.done, scored("prune", trained, masks)]
            progress = progress._replace(stage="retune", step=0, data=None, best=None, done=done)
    return setup, trained, masks, progress
