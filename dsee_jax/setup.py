"""What a run reads, checked as a whole before the run writes anything."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from dsee_jax import config as configs
from dsee_jax import data as datasets
from dsee_jax import deltas as delta_trees
from dsee_jax import models, processes, prune, sharding, stacks, stores, text_metrics, tree, units, writing
from dsee_jax.aliases import Deltas, Key, Masks, Params, Supports
from dsee_jax.ckpt import adapter, hf
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.config import Config
from dsee_jax.data import responses
from dsee_jax.data.batches import bucket_edges, micro_batches
from dsee_jax.data.packing import pack
from dsee_jax.data.tokens import Tokens, ends, load_tokenizer, padding, tokenize
from dsee_jax.errors import InputError

CONFIG = "config.yaml"
"""The resolved config in the folder of a run."""


class Data(NamedTuple):
    """A task, tokenised."""

    task: datasets.Task
    train: Tokens
    dev: dict[str, Tokens]
    edges: np.ndarray  # padded lengths, increasing
    exercise: writing.Exercise | None = None  # of causal-lm, where texts are to be written


class Setup(NamedTuple):
    """All that a run reads, in memory."""

    config: Config
    folder: Path  # of the pretrained model
    model: Any  # a Linen module with a config
    params: Params  # pretrained, head included
    head: list[str]  # paths of the task head
    prunable: list[str]  # paths of the kernels that may be pruned
    trained: dict[str, Any]  # {"deltas", "params"} at the start
    supports: Supports
    data: Data
    placed: sharding.Placement  # where arrays lie
    kept: Masks  # the heads and neurons that the run has kept, once it has cut some out; see `dsee_jax.units`


def keys(seed: int) -> dict[str, jax.Array]:
    """Return the PRNG keys of a run by what they decide."""
    root = jax.random.key(seed)
    return {
        name: jax.random.fold_in(root, number) for number, name in enumerate(("head", "deltas", "dropout", "prune"))
    }


def prepare(config: Config) -> Setup:
    """Read and check all that a run needs; write nothing.

    Raises:
      InputError: whatever of the config, the model, the data or ``output_dir`` cannot work.
    """
    model: Any
    # A host may lack a file that the others have; what lies between and comes after they do together.
    with processes.unanimous():
        configs.check(config)
        _check_output(config)
        mesh = sharding.mesh(config.mesh, batch_size=config.train.batch_size)
        folder = resolve(config.model.path)
    task, key, asked = read_task(config), keys(config.train.seed), config.model
    with processes.unanimous():
        model, params = hf.load_pretrained(
            *(folder, configs.model_task(config), task.num_labels),
            **{name: getattr(asked, name) for name in ("new_head", "dtype", "param_dtype", "scan", "remat")},
            sharding=lambda model: sharding.placement(mesh, model).sharding,
            key=key["head"],
        )
        if config.train.dropout >= 0:
            model = model.clone(config=model.config.with_dropout(config.train.dropout))
        flat = tree.flatten(params)
        head, moving = trains(config, model, params)
        prunable = tree.select(config.prune.targets, flat) if config.prune.kind != "none" else []
        for path in prunable:
            _check_prunable(path, flat[path].shape, config.prune)
        if config.prune.kind in configs.CUTTING:
            _check_units(model, params, prunable, config.prune)
    data = read_data(config, task, folder, model)
    with processes.unanimous():
        deltas, supports = _updates(config, folder, model, params, key["deltas"])
    trained = {"deltas": deltas, "params": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moving)}
    if not jax.tree.leaves(trained):
        raise InputError(
            "nothing is trained: delta.rank and delta.nonzeros are 0, and causal-lm has no new head; set one, or train.full"
        )
    placed = sharding.placement(mesh, model)
    return Setup(config, folder, model, params, head, prunable, trained, supports, data, placed, {})


def _updates(config: Config, folder: Path, model: Any, params: Params, key: Key) -> tuple[Deltas, Supports]:
    """Return the updates that a run begins with, and where their sparse values live: new ones, or those of another run."""
    delta = config.delta
    if not delta.start:
        return delta_trees.init(params, delta, key=key)
    start = stores.local(delta.start)
    kept = adapter.load(start)
    if getattr(model, "scan", False):
        kept = kept._replace(deltas=stacks.stack(kept.deltas), supports=stacks.stack(kept.supports))
    adapter.check(start, folder, params, kept)
    # Of the shapes that the config asks for, wherever their values are.
    new, _ = delta_trees.init(params, dataclasses.replace(delta, support="random"), key=key)
    here, there = ({path: leaf.shape for path, leaf in tree.flatten(one).items()} for one in (new, kept.deltas))
    for path in sorted(here.keys() | there.keys()):
        if here.get(path) != there.get(path):
            raise InputError(
                f"delta.start {start}: {path!r} is {there.get(path, 'not')} there and {here.get(path, 'not')} by this config: "
                "set delta.targets, rank and nonzeros as they were"
            )
    for name in ("scale", "scale_sparse"):
        if (found := kept.config[name]) != (asked := getattr(delta, name)):
            raise InputError(
                f"delta.start {start}: {name} is {found} there and {asked} by this config: set it as it was"
            )
    return jax.tree.map(jnp.asarray, kept.deltas), jax.tree.map(jnp.asarray, kept.supports)


def trains(config: Config, model: Any, params: Params) -> tuple[list[str], Any]:
    """Return the paths of the task head, and the tree of the params that a run trains beside its updates."""
    # What a language model ends with is its own, not of the task.
    flat, causal = tree.flatten(params), configs.model_task(config) == "causal-lm"
    head = [] if causal else tree.select(models.find(model.config.model_type).HEAD, flat)
    return head, params if config.train.full else tree.split(params, head)[0]


def check_length(config: Config, folder: Path | str, model: Any) -> None:
    """Raise `InputError` for examples longer than the positions of the model in ``folder``."""
    longest = model.config.longest
    if longest is not None and config.data.max_length > longest:
        raise InputError(f"data.max_length is {config.data.max_length}; {folder} has {longest} positions: use fewer")


def read_task(config: Config) -> datasets.Task:
    """Return the task of a run; raises `InputError` as `dsee_jax.data.load` does."""
    return datasets.load(config.data, seed=config.train.seed, causal=configs.model_task(config) == "causal-lm")


def read_data(config: Config, task: datasets.Task, folder: Path, model: Any) -> Data:
    """Return a task tokenised by the tokenizer in ``folder`` for ``model``; raises `InputError` where they do not fit.

    The processes of a job do this together: each encodes a part of the texts.
    """
    with processes.unanimous():
        check_length(config, folder, model)
        tokenizer, exercise = load_tokenizer(folder), None
    if task.causal:
        (train, *others), exercise = _texts(config, task, folder, tokenizer, model)
    else:
        train, *others = (
            tokenize(tokenizer, examples, config.data.max_length, vocab_size=model.config.vocab_size)
            for examples in (task.train, *task.dev.values())
            if isinstance(examples, datasets.Examples)
        )
    types, known = max(int(tokens.token_type_ids.max()) for tokens in (train, *others)), model.config.type_vocab_size
    # A model without token types takes no notice of them.
    if known and types >= known:
        raise InputError(
            f"{folder}: the tokenizer gives token type {types}, the model has {known}: they are not of one model"
        )
    edges = bucket_edges(np.concatenate([tokens.lengths for tokens in (train, *others)]))
    micro_batches(config.train.batch_size, int(edges[-1]), config.data.batch_tokens)
    return Data(task, train, dict(zip(task.dev, others, strict=True)), edges, exercise)


def _texts(
    config: Config, task: datasets.Task, folder: Path, tokenizer: Any, model: Any
) -> tuple[list[Tokens], writing.Exercise | None]:
    """Return the texts of a task of causal-lm, train first, packed where asked for, and what is to be written."""
    data, options, size = config.data, config.generate, model.config.vocab_size
    ending = ends(folder, tokenizer)
    pad = padding(tokenizer, ending)
    found, exercise = [], None
    for examples in (task.train, *task.dev.values()):
        assert isinstance(examples, datasets.Prompts)
        pairs = responses.encode(tokenizer, examples, ends=ending, vocab_size=size)
        laid = responses.lay(pairs, data.max_length, pad_id=pad, where=examples.where)
        found.append(pack(laid, data.max_length) if data.packing else laid)
        if options.new_tokens and examples is next(iter(task.dev.values())):
            exercise = writing.exercise(tokenizer, ending, pad, pairs, examples.completion, most=options.prompts)
    if exercise is not None:
        with processes.unanimous():
            text_metrics.need()
        longest, most = model.config.longest, max(map(len, exercise.prompts))
        if longest is not None and most + options.new_tokens > longest:
            raise InputError(
                f"generate.new_tokens is {options.new_tokens}; a prompt of {most} tokens and so many new ones are more than "
                f"the model's {longest} positions: ask for fewer, or for none with 0"
            )
    return found, exercise


def _check_prunable(path: str, shape: tuple[int, ...], prune: configs.PruneConfig) -> None:
    """Refuse now what pruning would refuse after the stage tune."""
    if len(shape) not in (2, 3):
        raise InputError(f"prune.targets takes {path!r}, which has the shape {shape}; expected a kernel (in, out)")
    if prune.kind == "nm" and shape[-2] % prune.m:
        raise InputError(f"prune.m is {prune.m}; {path!r} has {shape[-2]} inputs: use a number that divides them")


def _check_units(model: Any, params: Params, prunable: list[str], pruning: configs.PruneConfig) -> None:
    """The same for heads and neurons."""
    flat = tree.flatten(params)
    for kind, layers in models.cuts(model).items():
        amount = getattr(pruning, kind)
        counts = [units.count(params, each) for each in layers]
        # EarlyBERT compares heads within a layer and neurons over the model (arXiv 2101.00063, section 3.2).
        together = kind == "neurons" if pruning.kind == "earlybert" else pruning.scope == "global"
        for total in [sum(counts)] if together else counts:
            prune.going(f"prune.{kind}", amount, total)
        for path in (path for each in layers for path in each.axes if amount and path.endswith("/kernel")):
            if path in flat and path not in prunable:
                raise InputError(
                    f"prune.{kind} is {amount} and prune.targets leaves out {path!r}, which goes with them"
                )


def _check_output(config: Config) -> None:
    """Refuse a folder that is not this run's: one with other files, or with the config of another run."""
    folder = stores.place(config.output_dir)
    if str(folder).startswith("s3://"):
        raise InputError(
            f"output_dir {folder}: Orbax, which writes the checkpoints of a run, reaches gs:// and no other store; give a "
            "folder (of a mounted bucket, for instance), and copy model/ and adapter/ afterwards"
        )
    with stores.reached(folder):
        kept = _kept_config(folder)
    if kept is None:
        return
    before, now = (tree.flatten(yaml.safe_load(text)) for text in (kept, configs.dump(config)))
    other = [
        f"{path.replace('/', '.')} is {before.get(path)!r} there and {now.get(path)!r} here"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and path != "output_dir" and not path.startswith("mesh/")
    ]
    if other:
        more = f" (and {len(other) - 1} more)" if other[1:] else ""
        raise InputError(f"output_dir {folder} belongs to another config: {other[0]}{more}; name another folder")


def _kept_config(folder: stores.Place) -> str | None:
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
