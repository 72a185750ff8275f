"""The folder of a run: empty, or with the files of the same config."""

import yaml

from dsee_jax import tree
from dsee_jax.ckpt.folders import CONFIG
from dsee_jax.config import Config
from dsee_jax.errors import InputError
from dsee_jax.runtime import storage
from dsee_jax.train import config_file


def check_output(config: Config) -> None:
    """Refuse a folder that is not this run's: one with other files, or with the config of another run."""
    folder = storage.as_path(config.output_dir)
    if str(folder).startswith("s3://"):
        raise InputError(
            f"output_dir {folder}: Orbax, which writes the checkpoints of a run, reaches gs:// and no other store; give a "
            "folder (of a mounted bucket, for instance), and copy model/ and adapter/ afterwards"
        )
    with storage.store_errors(folder):
        kept = _kept_config(folder)
    if kept is None:
        return
    before, now = (tree.flatten(yaml.safe_load(text)) for text in (kept, config_file.dump(config)))
    other = [
        f"{path.replace('/', '.')} is {before.get(path)!r} there and {now.get(path)!r} here"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and path != "output_dir" and not path.startswith("mesh/")
    ]
    if other:
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        raise InputError(f"output_dir {folder} belongs to another config: {other[0]}{more}; name another folder")


def _kept_config(folder: storage.Place) -> str | None:
    """Return the text of the config that a folder of a run holds; None where there is no run yet."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; name a folder")
    # What a crash left half-written is no sign of a run.
    if not folder.exists() or all(path.suffix == ".partial" for path in folder.iterdir()):
        return None
    kept = folder / CONFIG
    if not kept.exists():
        raise InputError(f"output_dir {folder} is not empty and holds no {CONFIG}: it is no run's; name another folder")
    return kept.read_text(encoding="utf-8")
