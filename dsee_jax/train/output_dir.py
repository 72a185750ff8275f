"""The output folder of a run: new, empty, or with the files of a run of the same config."""

import yaml

from dsee_jax import tree
from dsee_jax.ckpt.folders import CONFIG
from dsee_jax.config import Config
from dsee_jax.errors import InputError
from dsee_jax.runtime import storage
from dsee_jax.train import config_file


def check_output(config: Config) -> None:
    """Raise `InputError` if ``output_dir`` has other files, or the files of a run of another config."""
    folder = storage.as_path(config.output_dir)
    if str(folder).startswith("s3://"):
        raise InputError(
            f"output_dir {folder}: Orbax, which writes the checkpoints of a run, supports gs:// and no other store; use a "
            "folder (for instance of a mounted bucket), and copy model/ and adapter/ afterwards"
        )
    with storage.store_errors(folder):
        existing = _existing_config(folder)
    if existing is None:
        return
    before, now = (tree.flatten(yaml.safe_load(text)) for text in (existing, config_file.dump(config)))
    other = [
        f"{path.replace('/', '.')} is {before.get(path)!r} in its config and {now.get(path)!r} in yours"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and path != "output_dir" and not path.startswith("mesh/")
    ]
    if other:
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        raise InputError(f"output_dir {folder} belongs to another config: {other[0]}{more}; name another folder")


def _existing_config(folder: storage.Place) -> str | None:
    """Return the text of the config in the folder; None where the folder has no run yet."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; name a folder")
    # A crash before the config was complete leaves partial files only.
    if not folder.exists() or all(path.suffix == ".partial" for path in folder.iterdir()):
        return None
    if not (folder / CONFIG).exists():
        raise InputError(f"output_dir {folder} is not empty and has no {CONFIG}: it is no run's; name another folder")
    return (folder / CONFIG).read_text(encoding="utf-8")
