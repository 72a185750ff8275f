"""Trackers: TensorBoard, Trackio and Weights & Biases show the figures of a run while it trains.

A tracker is two functions (`Tracker`), and `TRACKERS` is the table of those that ``train.trackers`` names. The packages are
optional. Only process 0 of a job tracks. A resumed run goes on in the tracker's run that its first call began.

The step of a figure is the number of its checkpoint: the steps of the run so far, and one more for each finished stage, so
that the figures at the end of a stage and those after pruning have different steps. Names of figures::

    train/loss, train/learning_rate, train/tokens_per_second
    dev/accuracy ...            each evaluation on the dev set; with data.split_dev on the validation half
    stage/tune/accuracy ...     the model that each stage passes on
    final/weight_sparsity ...   the numbers of metrics.json
"""

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsee_jax.ckpt.folders import TRACKED, read_json
from dsee_jax.config import Config
from dsee_jax.errors import InputError, shorten
from dsee_jax.runtime import files, multihost, storage
from dsee_jax.runtime.storage import Place
from dsee_jax.train import config_file

PROJECT = "dsee_jax"
"""The project of a run in Trackio and Weights & Biases, where ``TRACKIO_PROJECT`` or ``WANDB_PROJECT`` names no other."""

EVENTS = "tensorboard"
"""The folder of TensorBoard's event files, in the folder of a run."""

FILES = (TRACKED, EVENTS, "wandb")
"""All that trackers write in the folder of a run. A folder with nothing else has no run yet: a tracker did not start."""

FLUSH = 10
"""Seconds between two writes of TensorBoard's event file."""


class Tracker(NamedTuple):
    """Where the figures of a run go, besides its log."""

    log: Callable[[Mapping[str, float], int], None]
    """Takes figures by name, and their step. Steps never fall within one call of a run; a resumed call repeats the steps after
    its checkpoint, with the same figures."""
    finish: Callable[[bool], None]
    """Takes whether the run ended well; called once, after the last figures."""


class About(NamedTuple):
    """A run, for a tracker that begins or goes on."""

    out: Place  # the folder of the run
    id: str  # the same in every call of the run
    settings: dict[str, Any]  # of the config, by dotted key
    step: int | None  # of the checkpoint that the run goes on from; None at its start

    @property
    def name(self) -> str:
        """The name of the folder, and the id, which tells apart runs in folders of one name."""
        return f"{self.out.name}-{self.id}"


def tensorboard(about: About) -> Tracker:
    """Write event files, without TensorFlow, for ``tensorboard --logdir OUTPUT_DIR``."""
    import tensorboardX

    # TensorBoard drops the figures from this step on that an interrupted call wrote.
    purge = None if about.step is None else about.step + 1
    writer = tensorboardX.SummaryWriter(str(about.out / EVENTS), flush_secs=FLUSH, purge_step=purge)

    def log(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, lambda well: writer.close())


def trackio(about: About) -> Tracker:
    """Log to Trackio: a database on this machine or, with ``TRACKIO_SPACE_ID``, a Space of the Hugging Face Hub."""
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    run = trackio.init(project=project, name=about.name, config=about.settings, resume="allow", embed=False)
    return Tracker(lambda figures, step: run.log(dict(figures), step=step), lambda well: run.finish())


def wandb(about: About) -> Tracker:
    """Log to Weights & Biases; ``WANDB_MODE=offline`` keeps the figures in the folder of the run, for ``wandb sync``."""
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=about.name,
        id=about.id,
        resume="allow",
        config=about.settings,
        dir=str(about.out) if isinstance(about.out, Path) else None,
    )
    return Tracker(lambda figures, step: run.log(dict(figures), step=step), lambda well: run.finish(int(not well)))


TRACKERS: dict[str, Callable[[About], Tracker]] = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}
"""The members of `dsee_jax.config.TRACKERS`, whose packages the extras of their names install."""

PACKAGES = {"tensorboard": "tensorboardX"}
"""The packages that have another name than their tracker."""

FIXES = {"wandb": "log in with `wandb login`, or set WANDB_MODE=offline"}
"""The way out where a tracker does not start."""


def check(config: Config) -> None:
    """Raise `InputError` where ``train.trackers`` names a tracker that this process cannot use; imports no tracker."""
    for name in config.train.trackers if multihost.is_main() else ():
        package = PACKAGES.get(name, name)
        spec = importlib.util.find_spec(package)
        # A folder of that name, such as the one that wandb writes, has no origin.
        if spec is None or spec.origin is None:
            raise InputError(
                f"train.trackers has {name!r}, and its package {package} is not installed: pip install {package}"
            )
        if name == "tensorboard" and storage.remote(config.output_dir):
            raise InputError(
                f"train.trackers has 'tensorboard', which writes to a folder of this machine; output_dir is "
                f"{config.output_dir}: use another tracker, or name a folder"
            )


@contextlib.contextmanager
def opened(config: Config, step: int | None, more: Sequence[Tracker] = ()) -> Iterator[tuple[Tracker, ...]]:
    """Yield the trackers of a run, those of its config and ``more``; none on other processes than process 0.

    Args:
      config: of the run.
      step: of the checkpoint that the run goes on from; None at its start.
      more: trackers of the caller.

    Raises:
      InputError: on every process, if a tracker does not start.
    """
    trackers: list[Tracker] = []
    well = False
    try:
        with multihost.raise_on_all():
            if multihost.is_main():
                trackers.extend(more)
                about = _about(config, step) if config.train.trackers else None
                trackers.extend(_started(name, about) for name in config.train.trackers if about)
                if about:
                    files.write(about.out / TRACKED, {"id": about.id})
        yield tuple(trackers)
        well = True
    finally:
        # Each is ended, also where another fails.
        with contextlib.ExitStack() as ends:
            for tracker in reversed(trackers):
                ends.callback(tracker.finish, well)


def _started(name: str, about: About) -> Tracker:
    try:
        return TRACKERS[name](about)
    except Exception as error:  # each package has errors of its own, from a missing login to a lost connection
        fix = FIXES.get(name, f"leave {name} out of train.trackers")
        problem = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"train.trackers: {name} does not start ({shorten(problem)}): {fix}") from error


def _about(config: Config, step: int | None) -> About:
    out = storage.as_path(config.output_dir)
    with storage.store_errors(out):
        known = read_json(out / TRACKED).get("id") if step is not None and (out / TRACKED).exists() else None
    identity = known if isinstance(known, str) else uuid.uuid4().hex[:8]
    return About(out, identity, config_file.flat(config), step)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record of the log by their names in a tracker."""
    result = named("train", record)
    for key, value in record.items():
        if isinstance(value, Mapping):
            result |= named("dev" if key == "metrics" else key, value)
    return result


def named(prefix: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of ``values`` under ``prefix/``, without those that are nested."""
    return {f"{prefix}/{name}": float(value) for name, value in values.items() if isinstance(value, int | float)}


def log(trackers: Sequence[Tracker], figures: Mapping[str, float], step: int) -> None:
    """Pass figures to every tracker."""
    for tracker in trackers:
        tracker.log(figures, step)
