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

from dsee_jax import tree
from dsee_jax.ckpt import checkpoints
from dsee_jax.ckpt.folders import CONFIG, LOG, METRICS
from dsee_jax.config import CUTTING, Config
from dsee_jax.runtime import console, files, multihost, preemption, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.train import config_file, pruning, report, results, sharding, stages
from dsee_jax.train.setup import Setup, prepare
from dsee_jax.train.stages import Progress
from dsee_jax.typing import Masks


def run(config: Config, *, say: Callable[[Any], None] = print) -> dict[str, Any]:
    """Run every stage of a config, or what is left of them, and return what ``metrics.json`` holds.

    Args:
      config: the run, the same on every process of a job (`dsee_jax.runtime.multihost`); ``config.output_dir`` gets all files.
      say: takes the lines and tables that a person reads.

    Raises:
      InputError: something of the input cannot work; nothing has been written then.
      Preempted: SIGTERM came; the last step is saved, and the same call goes on from it.
    """
    settings = tree.flatten(dataclasses.asdict(config))
    multihost.assert_equal("config", {path.replace("/", "."): value for path, value in settings.items()})
    setup = prepare(config)
    out = storage.as_path(config.output_dir)
    say = say if multihost.is_main() else lambda text: None
    if multihost.allgather_objects((out / METRICS).exists())[0]:
        say(f"{out}: this run is finished; name another output_dir, or delete the folder, to run it again")
        return json.loads((out / METRICS).read_text(encoding="utf-8"))
    if multihost.is_main() and isinstance(out, pathlib.Path):  # a store has no folders but those of its files
        out.mkdir(parents=True, exist_ok=True)
    # Another mesh than that of the beginning goes on with the same run.
    files.write_text(out / CONFIG, config_file.dump(config))
    multihost.barrier("the folder of the run is there")
    with preemption.noticed(), checkpoints.opened(out / "checkpoints") as store:
        final, trained, masks, progress = _stages(setup, store, out, say)
    setup, final, trained, masks = results.split_updates(setup, final, trained, masks)
    content = {}
    if multihost.is_main():
        content = results.results(setup, final, trained, masks, progress.done)
        content |= results.write(final, trained, masks, out)
        content |= cost(progress)
        files.flush(out / LOG)
        files.write(out / METRICS, content)
        report.final(content, out, say)
    return multihost.allgather_objects(content)[0]


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
    prune, plan = setup.config.prune, {stage.name: stage for stage in stages.stages(setup)}
    compiled = stages.programs(setup)
    trained, masks = None, {}
    found = checkpoints.latest(store, lambda masks: sharding.shardings(setup.placed, {"masks": masks})["masks"])

    def scored(name: str, trained: dict[str, Any], masks: Masks) -> dict[str, Any]:
        found = compiled.write(trained, masks) | compiled.evaluate(trained, masks)
        files.append(out / LOG, {"stage": name, "step": 0, "metrics": found})
        say(f"{name}: {console.line(found)}")
        return {"name": name, "metrics": found}

    if found is None:
        files.write_text(out / LOG, "")
        trained = setup.trained
        progress = Progress(next(iter(plan)), 0, None, None, [scored("before", trained, {})], 0.0, 0, [])
    else:
        progress, masks = Progress(**found[0]), found[1]
        if masks and prune.kind in CUTTING and progress.stage != "search":
            setup, masks = pruning.smaller(setup, masks), {}
            compiled = stages.programs(setup)
        over = list(plan)[: list(plan).index(progress.stage)]
        over += [stage["name"] for stage in progress.done]
        files.rewind(out / LOG, over, progress.stage, progress.step)
        say(f"{out}: going on at step {progress.step} of stage {progress.stage}")
    for name in list(plan)[list(plan).index(progress.stage) :]:
        if name == "search":
            searching = stages.programs(setup, searching=True)
            kept, progress = stages.search(
                setup, searching, plan[name], masks, progress, store, out, resumed=trained is None
            )
            setup, masks = pruning.smaller(setup, kept), {}
            trained, compiled = setup.trained, stages.programs(setup)
            drawn = scored("draw", trained, masks) | {"steps": progress.step}
            progress = progress._replace(stage="tune", step=0, data=None, done=[*progress.done, drawn])
            continue
        trained, masks, progress = stages.fit(setup, compiled, plan[name], trained, masks, progress, store, out)
        say(f"{name}: {console.line(progress.done[-1]['metrics'])}")
        if name == "tune" and prune.kind not in ("none", "earlybert"):
            total = len(stages.batches(setup, plan["retune"].epochs)) if "retune" in plan else 0
            masks = pruning.draw(setup, trained, {}, pruning.sparsities(prune, total)[0])
            setup, trained, masks = pruning.apply_cut(setup, trained, masks)
            # A smaller model is another program.
            compiled = stages.programs(setup) if setup.kept else compiled
            done = [*progress.done, scored("prune", trained, masks)]
            progress = progress._replace(stage="retune", step=0, data=None, best=None, done=done)
    return setup, trained, masks, progress
