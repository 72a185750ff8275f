"""Export of a finished run: Hugging Face folder, compact checkpoint, StableHLO program or PEFT adapter."""

import logging
import os
import shlex
import shutil
from pathlib import Path

from dsee_jax.ckpt import card, companions, hf_save, kept_units
from dsee_jax.ckpt.adapter import Saved
from dsee_jax.ckpt.folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CARD,
    KEPT,
    METRICS,
    MODEL,
    MODEL_FILES,
    PEFT_WEIGHTS,
    read_json,
)
from dsee_jax.errors import InputError
from dsee_jax.export import peft, stablehlo
from dsee_jax.models import hf_config
from dsee_jax.prune import compaction
from dsee_jax.runtime import earlier_output, files, storage, writable
from dsee_jax.runtime.storage import Place
from dsee_jax.train import run_card
from dsee_jax.train.finished_run import Finished, load, plain_params

log = logging.getLogger(__name__)

FORMS = ("hf", "compact", "stablehlo", "peft")
"""The formats of an export."""

HEADER = "---\n# An export of dsee_jax.\n"
"""The first characters of the card of every export: the front matter begins with a comment."""

FILES = (
    *(*MODEL_FILES, *companions.PATTERNS, *(f"{ADAPTER}/{name}" for name in ADAPTER_FILES)),
    *(ADAPTER_CONFIG, PEFT_WEIGHTS, stablehlo.PROGRAM, stablehlo.WEIGHTS, stablehlo.SIGNATURE, stablehlo.EXAMPLE),
)
"""Patterns of the files of exports in every format; the files that are copied from a model add to them."""


def export_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    form: str = "hf",
    factors: bool = False,
    base: str = "",
    overwrite: bool = False,
) -> None:
    """Write the model of a finished run in another format, with a model card.

    Args:
      run: the folder of the run, on this machine or in a store.
      out: the new folder, on this machine or in a store; it is complete or absent.
      form: ``hf``: a Hugging Face folder, with zeros for the pruned heads or neurons whose number its fields cannot hold;
        ``compact``: a folder without any pruned units; ``stablehlo``: a program that needs only jax
        (`dsee_jax.export.stablehlo`); ``peft``: the updates and the head, for the pretrained base or, where the run
        pruned it, for ``model/`` of the run (`dsee_jax.export.peft`).
      factors: for hf and compact: keep the pruned weights sparse and copy the adapter to ``out/adapter``. Otherwise the
        updates are folded in: the touched kernels become dense, and any tool computes the tuned logits.
      base: for peft: the hub id by which the adapter names its base. Empty: the path of the pretrained model, or of ``model/``
        of the run; if that is on this machine, a warning says how others can open the adapter.
      overwrite: replace a folder at ``out`` if an export of this run or of one of a like model, in any format, wrote
        everything in it.

    Raises:
      InputError: as `dsee_jax.train.finished_run.load`; ``out`` is not empty (without ``overwrite``) or holds a file that no
        export wrote; or the format cannot represent the run.
    """
    if form not in FORMS:
        raise InputError(f"form is {form!r}; expected {', '.join(FORMS)}")
    if factors and form not in ("hf", "compact"):
        raise InputError(f"--factors does not apply to --format {form}: use it with hf or compact")
    if base and form != "peft":
        raise InputError(f"--base does not apply to --format {form}: use it with peft")
    if base and not card.hub_ids([base]):
        raise InputError(f"--base {base} is no hub id; expected OWNER/NAME of a model repository")
    place = storage.as_output(out)
    _check(place, overwrite)
    folder = storage.download(run)
    names = (*FILES, *companions.others(folder / MODEL)) if overwrite else ()
    if overwrite:
        with storage.store_errors(place):
            earlier_output.check(place, names, marker=(CARD, HEADER))
    finished = load(folder)
    if form == "peft":
        base = base or _base(folder, finished)
    with files.folder(place, replaces=names) as staging:
        _write(folder, finished, staging, form, factors, base)
        text = run_card.render(
            finished.config,
            read_json(folder / METRICS),
            name=place.name,
            classes=finished.task.num_labels,
            form="model" if factors else form,
            base=base,
        )
        (staging / CARD).write_text(text.replace("---\n", HEADER, 1), encoding="utf-8")


def _check(out: Place, overwrite: bool) -> None:
    """Raise `InputError` unless the folder can be written and, without ``overwrite``, is absent or empty."""
    if isinstance(out, Path):
        writable.check_folder(out, "OUT", writable.LONGEST)
    with storage.store_errors(out):
        if not (overwrite or earlier_output.is_absent(out)):
            raise InputError(f"{out} exists: give a new folder, or --overwrite to replace an earlier export")


def _write(run: Path, finished: Finished, out: Path, form: str, factors: bool, base: str) -> None:
    if form == "stablehlo":
        stablehlo.write(out, finished.model, plain_params(finished), source=run / MODEL, labels=finished.task.labels)
    elif form == "peft":
        peft.save(out, finished.model, _adapter(run, finished), base=base)
    else:
        _write_model(run, finished, out, form, factors)


def _adapter(run: Path, finished: Finished) -> Saved:
    if not finished.adapter or not finished.adapter.deltas:
        why = "its pruning removed them all" if finished.adapter else "delta.rank and delta.nonzeros are 0"
        raise InputError(f"{run} has no updates ({why}): use --format hf")
    return finished.adapter


def _base(run: Path, finished: Finished) -> str:
    """Return the base of a run's updates: the pretrained model, or ``model/`` of the run where its weights are others.

    Warns if other machines do not have it.
    """
    adapter = _adapter(run, finished)
    changed = adapter.masks or adapter.kept or "kept" in adapter.config
    base = str((run / MODEL).absolute()) if changed else adapter.config["base"]
    if not card.hub_ids([base]):
        upload = f"upload it (hf upload OWNER/NAME {shlex.quote(base)}), and " if changed else ""
        log.warning(
            "the adapter names its base %s, which other machines do not have: to share the adapter, %sexport again with "
            "--base OWNER/NAME, the hub id of these weights",
            *(base, upload),
        )
    return base


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
        units = [kind for kind in kinds if kind in model.config.widths]
        # The layers that are dropped number the others.
        model, params = compaction.expand(
            model, params, {kind: kept[kind] for kind in kept if kind in (*units, "layers")}
        )
        if "hidden" in hf_config.kept_kinds(model.config):
            raise InputError(
                f"--format hf: the fields of {model.config.model_type} cannot hold a width of {model.config.hidden_size} with "
                f"heads of {model.config.head_size} entries, and norms would count zeros: use --format compact"
            )
        log.warning(
            "%s: zeros stand for the pruned %s: the fields of %s hold no such numbers",
            *(run, " and ".join(units), model.config.model_type),
        )
        kept = {kind: layers for kind, layers in kept.items() if kind not in units}
    hf_save.save_pretrained(out, model, params, source=run / MODEL, labels=finished.task.labels, kept=kept)
    if finished.adapter and factors:
        shutil.copytree(run / ADAPTER, out / ADAPTER)
