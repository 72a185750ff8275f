"""The frozen kernels of a run that pruning changed: kept in its folder, so that a resumed run has them again.

``pruned/kernels.safetensors`` has each kernel by its path, as the run holds it; its SHA-256 is in ``hashes.json``. The stage
prune writes both before the first checkpoint of re-tuning, and writes them again where a run died in it.
"""

import numpy as np

from dsee_jax import tree
from dsee_jax.ckpt import adapter, tensors
from dsee_jax.ckpt.folders import PRUNED
from dsee_jax.errors import InputError
from dsee_jax.runtime import files, multihost, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.train import hashes, pruning, sharding
from dsee_jax.train.setup import Setup
from dsee_jax.typing import Masks

FILE = "kernels.safetensors"
"""The name of the file in the folder `PRUNED`."""


def save(setup: Setup, masks: Masks, out: Place) -> None:
    """Write the frozen kernels at the paths of ``masks``, completely or not at all; all processes call this."""
    moving, flat = tree.flatten(setup.trained["params"]), tree.flatten(setup.params)
    frozen = multihost.to_host({path: flat[path] for path in tree.flatten(masks) if path not in moving})
    with multihost.raise_on_all():
        if multihost.is_main() and frozen:
            with files.folder(out / PRUNED, replaces=(FILE,)) as staging:
                tensors.save(staging / FILE, frozen)
            hashes.write(out, {PRUNED: {hashes.WEIGHTS: adapter.fingerprint(out / PRUNED)}})


def restored(setup: Setup, out: Place) -> Setup:
    """Return the setup with the kernels that `save` wrote; that without any is ``setup``.

    Raises:
      InputError: the file is missing or changed since.
    """
    recorded = hashes.read(out).get(PRUNED)
    if not recorded:
        return setup
    values: dict[str, np.ndarray] = {}
    with multihost.raise_on_all():
        folder = storage.download(out / PRUNED)
        if not (folder / FILE).exists() or adapter.fingerprint(folder) != recorded[hashes.WEIGHTS]:
            raise InputError(
                f"{out / PRUNED / FILE} is missing or damaged, and this run goes on from its weights: restore it, or name "
                "another output_dir to begin again"
            )
        values = {path: tensors.read(stored) for path, stored in tensors.contents(folder / FILE).items()}
    placed = sharding.place(setup.placed, {"params": tree.unflatten(values)})
    return pruning.with_kernels(setup, tree.flatten(placed["params"]))
