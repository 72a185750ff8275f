"""Export of a finished run: Hugging Face folder, compact checkpoint, StableHLO program or PEFT adapter."""

import logging
import shutil
from pathlib import Path

from dsee_jax.ckpt import hf_save, kept_units
from dsee_jax.ckpt.adapter import Saved
from dsee_jax.ckpt.folders import ADAPTER, CARD, KEPT, METRICS, MODEL, read_json
from dsee_jax.errors import InputError
from dsee_jax.export import peft, stablehlo
from dsee_jax.models import hf_config
from dsee_jax.prune import compaction
from dsee_jax.train import run_card
from dsee_jax.train.finished_run import Finished, load, plain_params

log = logging.getLogger(__name__)


def export(run: Path, out: Path, *, form: str = "hf", factors: bool = False) -> None:
    """Write the model of a finished run in another format, with a model card.

    Args:
      run: the folder of the run.
      out: the new folder.
      form: ``hf``: a Hugging Face folder, with zeros for the pruned heads or neurons whose number its fields cannot hold;
        ``compact``: a folder without any pruned heads and neurons; ``stablehlo``: a program that needs only jax
        (`dsee_jax.export.stablehlo`); ``peft``: the updates and the head, for the pretrained base or, where the run
        pruned it, for ``model/`` of the run (`dsee_jax.export.peft`).
      factors: for hf and compact: keep the pruned weights sparse and copy the adapter to ``out/adapter``. Otherwise the
        updates are folded in: the touched kernels become dense, and any tool computes the tuned logits.

    Raises:
      InputError: as `dsee_jax.train.finished_run.load`; ``out`` exists; or the format cannot represent the run.
    """
    if factors and form not in ("hf", "compact"):
        raise InputError(f"--factors does not apply to --format {form}: use it with hf or compact")
    finished = load(run)
    if form == "stablehlo":
        stablehlo.write(out, finished.model, plain_params(finished), source=run / MODEL, labels=finished.task.labels)
    elif form == "peft":
        if not finished.adapter:
            raise InputError(f"{run} has no updates (delta.rank and delta.nonzeros are 0): use --format hf")
        peft.save(out, finished.model, finished.adapter, base=_base(run, finished.adapter))
    else:
        _write_model(run, finished, out, form, factors)
    text = run_card.render(
        finished.config,
        read_json(run / METRICS),
        name=out.name,
        classes=finished.task.num_labels,
        form="model" if factors else form,
    )
    (out / CARD).write_text(text, encoding="utf-8")


def _base(run: Path, adapter: Saved) -> str:
    """Return the base of a run's updates: the pretrained model, or ``model/`` of the run where its weights are others."""
    changed = adapter.masks or adapter.kept or "kept" in adapter.config
    return str((run / MODEL).absolute()) if changed else adapter.config["base"]


def _write_model(run: Path, finished: Finished, out: Path, form: str, factors: bool) -> None:
    model, params = finished.model, finished.params if factors else plain_params(finished)
    kept, kinds = kept_units.read(run / MODEL), hf_config.kept_kinds(model.config)
    if form == "compact" and not kept and not kinds:
        raise InputError(f"{run} has pruned no heads or neurons: use --format hf")
    if form == "hf" and kinds:
        if factors:
            raise InputError(
                "--factors: the updates have the shapes of the smaller model: use it with --format compact"
            )
        if not kept:
            raise InputError(f"{run / MODEL / KEPT} is missing: it lists the kept heads and neurons")
        log.warning(
            "%s: zeros stand for the pruned %s: the fields of %s hold no such numbers",
            *(out, " and ".join(kinds), model.config.model_type),
        )
        # The layers that are dropped number the others.
        model, params = compaction.expand(
            model, params, {kind: kept[kind] for kind in kept if kind in (*kinds, "layers")}
        )
        kept = {kind: layers for kind, layers in kept.items() if kind not in kinds}
    hf_save.save_pretrained(out, model, params, source=run / MODEL, labels=finished.task.labels, kept=kept)
    if finished.adapter and factors:
        shutil.copytree(run / ADAPTER, out / ADAPTER)
