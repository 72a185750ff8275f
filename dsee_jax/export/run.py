"""Write the model of a finished run in another format: HF folder, compact checkpoint, PEFT adapter, StableHLO program."""

import shutil
from pathlib import Path

from dsee_jax.ckpt import hf_save, kept_units
from dsee_jax.ckpt.folders import ADAPTER, MODEL
from dsee_jax.errors import InputError
from dsee_jax.export import peft, stablehlo
from dsee_jax.prune import compaction
from dsee_jax.train.reopen import Finished, folded, opened


def export(run: Path, out: Path, *, form: str = "hf", factors: bool = False) -> None:
    """Write the model of a finished run for something else.

    Args:
      run: its folder.
      out: the folder to make.
      form: ``hf``: a folder that any tool opens, with zeros for the heads and neurons that were cut; ``compact``: a smaller
        folder without them, which this library opens; ``stablehlo``: a program that needs no library but jax
        (`dsee_jax.export.stablehlo`); ``peft``: the low-rank updates and the head, for the base they were tuned from
        (`dsee_jax.export.peft`).
      factors: of hf and compact: keep the pruned weights as they are and copy the adapter to ``out/adapter``; else updates are
        folded in, which makes the touched kernels dense and gives any tool the tuned logits.

    Raises:
      InputError: as `opened`; ``out`` exists; or the form cannot hold this run.
    """
    if factors and form not in ("hf", "compact"):
        raise InputError(f"--factors: {form} has one way to hold updates: use it with --format hf or compact")
    found = opened(run)
    if form == "stablehlo":
        stablehlo.write(out, found.model, folded(found), source=run / MODEL, labels=found.task.labels)
    elif form == "peft":
        if not found.adapter or not found.config.delta.rank:
            raise InputError(f"{run} has no low-rank updates (delta.rank is 0): use --format hf")
        peft.save(out, found.model, found.adapter)
    else:
        _weights(run, found, out, form, factors)


def _weights(run: Path, found: Finished, out: Path, form: str, factors: bool) -> None:
    model, params, kept = found.model, found.params if factors else folded(found), kept_units.read(run / MODEL)
    whole = model.config == model.config.with_widths()
    if form == "compact" and whole:
        raise InputError(f"{run} cut no heads or neurons out: there is nothing to keep compact, use --format hf")
    if form == "hf" and not whole:
        if factors:
            raise InputError("--factors: the updates have the shapes of the cut model: use it with --format compact")
        if not kept:
            raise InputError(f"{run / MODEL / kept_units.KEPT} is missing: it says where the zeros belong")
        (model, params), kept = compaction.expand(model, params, kept), {}
    hf_save.save_pretrained(out, model, params, source=run / MODEL, kept=kept)
    if found.adapter and factors:
        shutil.copytree(run / ADAPTER, out / ADAPTER)
