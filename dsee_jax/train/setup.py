"""The setup of a run: model, params, updates and data, checked before the run writes a file."""

import dataclasses
import logging
import math
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsee_jax import models, tree
from dsee_jax.ckpt import adapted, adapter, formats, hf, hf_names, kept_units
from dsee_jax.ckpt.companions import MODULES
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import CUTTING, INPUT_SCORES, PRUNED_TARGETS, Config, DeltaConfig, model_task
from dsee_jax.deltas import create
from dsee_jax.deltas.adapter import kernels
from dsee_jax.errors import InputError
from dsee_jax.models.architecture import Model
from dsee_jax.prune import calibration, units, weights
from dsee_jax.runtime import multihost
from dsee_jax.train import labels, sharding
from dsee_jax.train.inputs import Data, read_data, read_task
from dsee_jax.train.output_dir import check_output
from dsee_jax.typing import Deltas, Key, Masks, Params, Supports

log = logging.getLogger(__name__)


class Setup(NamedTuple):
    """The inputs of a run, in memory."""

    config: Config
    folder: Path  # of the pretrained model
    model: Model
    params: Params  # pretrained, head included
    head: list[str]  # paths of the task head, of which ``trained`` may have a part only
    prunable: list[str]  # paths of the kernels that may be pruned
    trained: dict[str, Any]  # {"deltas", "params"}: the initial values
    supports: Supports
    data: Data
    placed: sharding.Placement  # the mesh, and the sharding of params
    kept: Masks  # the kept units (`dsee_jax.prune.units`); empty before structured pruning


def changes_kernels(setup: Setup) -> bool:
    """Return whether pruning changes frozen kernels of a run, besides the entries that it sets to 0."""
    prune, moving = setup.config.prune, tree.flatten(setup.trained["params"])
    changing = prune.kind in ("unstructured", "nm") and prune.score == "SPARSEGPT"
    return changing and any(path not in moving for path in setup.prunable)


def keys(seed: int) -> dict[str, jax.Array]:
    """Return the PRNG keys of a run by purpose: head, deltas, dropout, prune."""
    root = jax.random.key(seed)
    return {
        name: jax.random.fold_in(root, number) for number, name in enumerate(("head", "deltas", "dropout", "prune"))
    }


def prepare(config: Config) -> Setup:
    """Return the checked setup of a run; writes nothing.

    Raises:
      InputError: the config, the model, the data or ``output_dir`` is unusable.
    """
    model: Model
    # A single host may lack a file; the calls outside of these blocks are collective.
    with multihost.raise_on_all():
        check_output(config)
        mesh = sharding.mesh(config.mesh, batch_size=config.train.batch_size)
        folder = resolve(config.model.path)
        cut = bool(kept_units.read(folder))
    task, key, options = read_task(config), keys(config.train.seed), config.model
    names = ("new_head", "dtype", "param_dtype", "scan", "remat", "allow_unknown")
    with multihost.raise_on_all():
        model, params = hf.load_pretrained(
            *(folder, model_task(config), task.num_labels),
            **{name: getattr(options, name) for name in names},
            sharding=lambda model: sharding.placement(mesh, model, cut=cut).sharding,
            key=key["head"],
        )
        if not options.new_head:
            params, classes = labels.align(folder, model, params, task.labels)
            task = dataclasses.replace(task, labels=classes)
        if config.train.dropout >= 0:
            model = model.clone(config=model.config.with_dropout(config.train.dropout))
        config, start = with_start(with_rules(config, model), folder, model)
        if start and start.peft:
            params = adapted.with_params(params, start.saved, start.folder)
        flat = tree.flatten(params)
        head = task_head(config, model, params)
        moving = trainable_params(config, folder, model, params, start)
        config = with_rank(config, params, moving, head)
        prunable = tree.select(config.prune.targets, flat) if config.prune.kind != "none" else []
        for path in prunable:
            weights.check_prunable(path, flat[path].shape, config.prune)
        if config.prune.kind in CUTTING:
            units.check_units(model, params, prunable, config.prune)
        elif prunable and config.prune.score in INPUT_SCORES:
            _check_inputs(config, model, params, prunable)
    data = read_data(config, task, folder, model)
    with multihost.raise_on_all():
        if start:
            _check_start(config, folder, start, params)
        deltas, supports = initial_updates(config, start, params, key["deltas"])
        for path, delta in kernels(deltas).items():
            if path in prunable:
                weights.check_update(path, delta, config.prune)
    trained = {"deltas": deltas, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moving)}
    if not jax.tree.leaves(trained):
        raise InputError(
            "no parameter is trained: delta.rank and delta.nonzeros are 0, and causal-lm has no task head; set one of "
            "them, or train.full: true"
        )
    placed = sharding.placement(mesh, model, cut=cut)
    return Setup(config, folder, model, params, head, prunable, trained, supports, data, placed, {})


def _check_inputs(config: Config, model: Model, params: Params, prunable: Sequence[str]) -> None:
    try:
        calibration.check_applied(model, params, prunable)
    except InputError as error:
        raise InputError(f"prune.targets, with prune.score {config.prune.score}: {error}") from None


class Start(NamedTuple):
    """The adapter ``delta.start``."""

    folder: Path
    saved: adapter.Saved  # with stacked layers for a model that scans
    peft: bool  # of PEFT: the adapter decides targets, ranks and scale, and brings its head


def with_start(config: Config, folder: Path, model: Model) -> tuple[Config, Start | None]:
    """Return the config of a run and the adapter ``delta.start``, None if the run has new updates.

    An adapter of PEFT decides ``delta.targets``, ``rank`` and ``alpha``; one with sparse values ``nonzeros`` and
    ``scale_sparse`` too.

    Raises:
      InputError: no adapter, a damaged or unsupported one, or one of PEFT that belongs to another base.
    """
    delta = config.delta
    if not delta.start:
        return config, None
    place = resolve(delta.start)
    start = Start(place, adapted.read(place, model, str(folder)), formats.is_peft(place))
    if start.peft:
        own = {} if start.saved.supports else {"nonzeros": delta.nonzeros, "scale_sparse": delta.scale_sparse}
        delta = dataclasses.replace(adapted.described(delta, start.saved), **own)
        config = dataclasses.replace(config, delta=delta)
        line = "%s: %d updates of rank %d and scale %g, which replace delta.targets, rank and alpha"
        log.info(line, place, len(delta.targets), delta.rank, delta.scale)
    return config, start


def initial_updates(config: Config, start: Start | None, params: Params, key: Key) -> tuple[Deltas, Supports]:
    """Return the initial updates and their supports: new ones, or those of the adapter ``delta.start``."""
    delta = config.delta
    if not start:
        new = create.init(params, delta, key=key)
        return new.deltas, new.supports
    deltas, supports = start.saved.deltas, start.saved.supports
    if start.peft and delta.nonzeros and not supports:
        new = create.init(params, dataclasses.replace(delta, rank=0), key=key)
        deltas = tree.unflatten({**tree.flatten(deltas), **tree.flatten(new.deltas)})
        supports = new.supports
    # As new updates; the file of an adapter may have float16.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), deltas), jax.tree.map(jnp.asarray, supports)


def _check_start(config: Config, folder: Path, start: Start, params: Params) -> None:
    """Raise `InputError` unless the adapter fits the base in ``folder`` and, if it is of this library, this config."""
    delta, (place, saved, peft) = config.delta, start
    adapter.check(place, folder, params, saved)
    if peft:
        return
    recorded = {adapter.BASE_SHA256, adapter.MODEL_SHA256} & saved.config.keys()
    if recorded and multihost.is_main() and not config.train.allow_changed_inputs:
        sha256, allow = adapter.fingerprint(folder), "set train.allow_changed_inputs: true"
        adapter.check_base(place, saved.config, folder, sha256, allow=allow)
    expected = create.shapes(params, delta)
    shapes: dict[str, tuple[int, ...]] = {path: leaf.shape for path, leaf in tree.flatten(saved.deltas).items()}
    for path in sorted(expected.keys() | shapes.keys()):
        if shapes.get(path) != expected.get(path) and not _is_smaller(path, shapes, expected, saved, delta):
            raise InputError(
                f"delta.start {place}: {path!r} has the shape {shapes.get(path, 'none')} in the adapter and "
                f"{expected.get(path, 'none')} by this config: set delta.targets, rank and nonzeros as in its run"
            )
    for name in ("scale", "scale_sparse"):
        if (value := saved.config[name]) != (wanted := getattr(delta, name)):
            raise InputError(
                f"delta.start {place}: {name} is {value} in the adapter and {wanted} by this config: set it as in its run"
            )


def _is_smaller(
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    saved: adapter.Saved,
    delta: DeltaConfig,
) -> bool:
    """Return whether the run of an adapter had the config ``delta`` and made a smaller array at ``path`` than it expects.

    A cut takes values out of updates, at last whole updates, and the updates of a run from an adapter of PEFT may have smaller
    ranks.
    """
    run = saved.config.get("delta")
    if path not in expected or not isinstance(run, Mapping):
        return False
    if (run.get("rank"), run.get("nonzeros")) != (delta.rank, delta.nonzeros):
        return False
    if path in shapes:
        return all(map(operator.le, shapes[path], expected[path]))
    return path.rpartition("/")[0] in kernels(saved.deltas) or run.get("targets") == [*delta.targets]


def with_rules(config: Config, model: Model) -> Config:
    """Return the config with rules over the paths of ``model``, for targets that a word or Hugging Face's names give."""
    targets = [
        each for rule in config.delta.targets for each in (config.prune.targets if rule == PRUNED_TARGETS else [rule])
    ]
    config = dataclasses.replace(config, delta=dataclasses.replace(config.delta, targets=targets))
    delta, prune = (
        dataclasses.replace(section, targets=hf_names.to_rules(model, section.targets))
        for section in (config.delta, config.prune)
    )
    return dataclasses.replace(config, delta=delta, prune=prune)


def with_rank(config: Config, params: Params, moving: Params, head: Sequence[str]) -> Config:
    """Return the config with the rank that ``delta.budget`` affords.

    Args:
      config: the run.
      params: the params, or their shapes.
      moving: those that the run trains besides its updates.
      head: the paths of the task head. The weights that the budget is a share of are those of ``trainable_fraction``: all but
        the trained part of the head.

    Raises:
      InputError: the budget is too small for rank 1.
    """
    trained = tree.flatten(moving).keys() & set(head)
    weights = sum(math.prod(leaf.shape) for path, leaf in tree.flatten(params).items() if path not in trained)
    return dataclasses.replace(config, delta=create.with_budget(params, config.delta, weights))


def task_head(config: Config, model: Model, params: Params) -> list[str]:
    """Return the paths of the task head of a run; causal-lm has none."""
    return [] if model_task(config) == "causal-lm" else head_paths(model, params)


def head_paths(model: Model, params: Params) -> list[str]:
    """Return the paths of the task head; the output layer of a language model is pretrained, no task head."""
    return tree.select(models.find(model.config.model_type).head, tree.flatten(params))


def trainable_params(config: Config, folder: Path, model: Model, params: Params, start: Start | None = None) -> Params:
    """Return the tree of params that a run trains besides its updates: all, or the part of its head that ``train.head`` names.

    Params that an adapter of PEFT holds, in modules that PEFT trained whole, are trained on.

    Args:
      config: the run.
      folder: the checkpoint; one without weights counts as a pretrained model.
      model: its model.
      params: the params, or their shapes.
      start: the adapter that the run starts from.

    Raises:
      InputError: ``train.head`` leaves out a param that the checkpoint lacks.
    """
    brought = [*tree.flatten(start.saved.params)] if start and start.peft else []
    if config.train.full or model_task(config) == "causal-lm":
        return params if config.train.full else tree.split(params, brought)[0]
    architecture, head = models.find(model.config.model_type), head_paths(model, params)
    # The head of question answering gives no labels: all of it is the classifier.
    pooler = [path for path in head if path not in (models.label_axes(model) or head)]
    stored = hf.stored(folder, model, pooler) if any(folder.glob("*.safetensors")) else pooler
    frozen: list[str] = []
    if config.train.head == "classifier":
        frozen = pooler
        if missing := [path for path in pooler if path not in stored and path not in brought]:
            raise InputError(
                f"train.head is 'classifier'; {config.model.path} has no {missing[0]!r}, and a layer that is created at "
                "random must be trained: use auto"
            )
    elif config.train.head == "auto" and not (folder / MODULES).exists():
        # A sentence encoder averages its tokens or takes the first: its pooler had no part in its training.
        # Hugging Face's names tell the layers of the pretrained model from those of its head.
        own = [path for path in pooler if hf_names.tensor_of(architecture, path)[0].startswith(architecture.prefix)]
        frozen = [path for path in own if path in stored]
    return tree.split(params, list(dict.fromkeys([*(path for path in head if path not in frozen), *brought])))[0]
