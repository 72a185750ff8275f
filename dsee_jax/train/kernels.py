"""The frozen kernels of a run that pruning changed: kept in its folder, so that a resumed run has them again.

``pruned/kernels.safetensors`` has each kernel by its path, as the run holds it, with checksums beside it. The stage prune
writes it before the first checkpoint of re-tuning, and writes it again where a run died in it.
"""

import numpy as np

from dsee_jax import tree
from dsee_jax.ckpt import checksums, tensors
from dsee_jax.ckpt.folders import PRUNED
from dsee_jax.errors import InputError
from dsee_jax.runtime import files, multihost, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.train import pruning, sharding
from dsee_jax.train.setup import Setup, changes_kernels
from dsee_jax.typing import Masks

FILE = "kernels.safetensors"
"""The name of the file in the folder `PRUNED`."""


def save(setup: Setup, masks: Masks, out: Place) -> None:
    """Write the frozen kernels at the paths of ``masks``, completely or not at all; all processes call this."""
    moving, flat = tree.flatten(setup.trained["params"]), tree.flatten(setup.params)
    frozen = multihost.to_host({path: flat[path] for path in tree.flatten(masks) if path not in moving})
    with multihost.raise_on_all():
        if multihost.is_main() and frozen:
            with files.folder(out / PRUNED, replaces=(FILE, checksums.NAME)) as staging:
                tensors.save(staging / FILE, frozen)
                checksums.write(staging)


def restored(setup: Setup, out: Place) -> Setup:
    """Return the setup of a run after its stage prune, with the kernels that `save` wrote.

    Raises:
      InputError: the file is missing or damaged.
    """
    if not changes_kernels(setup):
        return setup
    values: dict[str, np.ndarray] = {}
    with multihost.raise_on_all():
        folder = storage.download(out / PRUNED)
        if not (folder / FILE).exists() or not (folder / checksums.NAME).exists() or checksums.damage(folder):
            raise InputError(
                f"{out / PRUNED / FILE} is missing or damaged, and this run goes on from its weights: restore it, or name "
                "another output_dir to begin again"
            )
        values = {path: tensors.read(stored) for path, stored in tensors.contents(folder / FILE).items()}
    placed = sharding.place(setup.placed, {"params": tree.unflatten(values)})
    return pruning.with_kernels(setup, tree.flatten(placed["params"]))
