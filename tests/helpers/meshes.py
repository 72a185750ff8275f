"""The jobs of `test_sharding` in a process with eight simulated devices: ``python meshes.py JOB FOLDER``."""

import functools
import json
import pathlib
import re
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import decoders
import dsee_jax
import runs
import tiny
from dsee_jax import counts, models, tree
from dsee_jax.ckpt import hf
from dsee_jax.config import DeltaConfig, MeshConfig
from dsee_jax.deltas import create
from dsee_jax.generation import decoding
from dsee_jax.ops import dense, topk
from dsee_jax.plan import hlo
from dsee_jax.plan import run as plan
from dsee_jax.prune import weights
from dsee_jax.train import loop, sharding, step

ONE = (1, 1, 1)
MESHES = ((8, 1, 1), (1, 4, 2), (2, 2, 2))
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
"""Sizes that eight devices divide, with two complete heads per device of the tensor axis."""

FAMILIES = {
    **{name: tiny.config(name, **SIZES) for name in ("bert", "deberta")},  # RoBERTa has BERT's axes
    "gpt2": decoders.config(model_type="gpt2", n_embd=32, n_head=4),
    "llama": decoders.config(**SIZES, num_key_value_heads=2),
    "llama, scanned": decoders.config(**SIZES, num_key_value_heads=2),
}
DELTA = DeltaConfig(targets=(".*/(query|value|up|output)/kernel",), rank=3, nonzeros=5, support="random")


def mesh(shape):
    if shape == ONE:
        return Mesh(np.array(jax.devices()[:1]).reshape(ONE), sharding.AXES)
    return sharding.mesh(MeshConfig(*shape), batch_size=16)


@functools.cache
def build(name):
    """A model, its params, its task head's paths and a batch of sixteen."""
    fields = FAMILIES[name]
    architecture = models.find(fields["model_type"])
    causal = fields["model_type"] in decoders.KINDS
    model = architecture.model(
        architecture.config.from_hf(fields), "causal-lm" if causal else "sequence-classification"
    )
    model = model.clone(config=model.config.with_dropout(0.0), **({"scan": True} if "scanned" in name else {}))
    ids = np.random.default_rng(0).integers(5, fields["vocab_size"], (16, 12)).astype(np.int32)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0), ids)["params"])
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": 0 * ids}
    if causal:
        head, answers = [], {"labels": np.roll(ids, -1, 1), "weights": np.ones(ids.shape, np.float32)}
    else:
        head = tree.select(architecture.head, tree.flatten(params))
        answers = {"labels": ids[:, 1] % 2, "weights": np.ones(16, np.float32)}
    return model, params, head, batch | answers


def micro_batches(shape):
    """Return the number of micro-batches of a step on a mesh."""
    return 2 if shape[1] == 4 else 1


def steps(name, shape):
    """Train two steps; return the trained parameters, the losses, the text of the compiled program and the frozen params."""
    model, params, head, batch = build(name)
    where = mesh(shape)
    # Adam would turn different rounding errors into steps of equal size.
    placed, optimizer = sharding.placement(where, model), optax.trace(0.9)
    adapter = jax.jit(lambda p: create.init(p, DELTA, key=jax.random.key(1)))(params)
    trained_head, rest = tree.split(params, head)
    trained = {"deltas": jax.tree.map(lambda leaf: leaf + 0.05, adapter.deltas), "params": trained_head}
    inner = step.train_step(model, optimizer, DELTA, joined=shape[2] == 1, parts=lambda batch: micro_batches(shape))

    def run(state, *args):
        with sharding.constrain_rows(where):
            new, loss = inner(state, *args)
        return jax.lax.with_sharding_constraint(new, sharding.shardings(placed, new)), loss

    state = sharding.place(placed, step.State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained)))
    frozen = sharding.place(placed, step.Frozen(rest, adapter.supports, {}))
    args = (frozen, sharding.split(where, batch), jax.random.key(0), jnp.float32(1e-2))
    compiled, losses = jax.jit(run).lower(state, *args).compile(), []
    for _ in range(2):
        state, loss = compiled(state, *args)
        losses.append(float(loss))
    return jax.device_get(state.trained), losses, compiled.as_text(), frozen.params


def layer_kernels(params):
    return [leaf for path, leaf in tree.flatten(params).items() if path.endswith("kernel") and "/layer" in path]


def communication(text, shape, params, passes):
    """Return what a step sends: the number of all-reduces and all-gathers of arrays with the shape of a complete kernel of a
    layer, the number of all-gathers, and the bytes gathered along ``fsdp`` over those of so many passes."""
    kernels = layer_kernels(params)
    whole = {f"f32[{','.join(map(str, size))}]" for leaf in kernels for size in (leaf.shape, leaf.shape[-2:])}
    rows = hlo.collectives(text, dict(zip(sharding.AXES, shape, strict=True)))
    gathers = [row for row in rows if row.kind == "all-gather"]
    pass_bytes = passes * sum(leaf.size * leaf.dtype.itemsize for leaf in kernels) / shape[2]
    return {
        "reduced": sum(row.count for row in rows if row.kind == "all-reduce" and row.shape in whole),
        "whole": sum(row.count for row in gathers if row.shape in whole and row.axes != ("fsdp",)),
        "gathers": sum(row.count for row in gathers),
        "passes": sum(row.bytes for row in gathers if row.axes == ("fsdp",)) / pass_bytes,
    }


def all_steps(_, families=tuple(FAMILIES), shapes=MESHES):
    figures = {}
    for name in families:
        trained, losses, *_ = steps(name, ONE)
        for shape in shapes:
            other, also, text, placed = steps(name, shape)
            largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(trained))
            errors = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained, other)
            matrices = [leaf for path, leaf in tree.flatten(placed).items() if path.endswith(("kernel", "embedding"))]
            held = [leaf.addressable_shards[0].data.size / leaf.size for leaf in matrices]
            figures[f"{name} {shape}"] = {
                "losses": float(np.abs(np.array(losses) - also).max()),
                "trained": max(jax.tree.leaves(errors)) / float(largest),
                **communication(text, shape, placed, micro_batches(shape)),
                "head": sum(path.endswith("kernel") for path in tree.flatten(trained["params"])),
                "held": max(held),
            }
    return figures


def pruning(_):
    """Compare the masks of sharded and unsharded kernels, and list the shapes that counting all-gathers."""
    where, generator = mesh((2, 2, 2)), np.random.default_rng(0)
    unsharded = {n: {"kernel": generator.normal(size=(32, 64)).round(1).astype(np.float32)} for n in ("a", "b")}
    placed = jax.device_put(unsharded, NamedSharding(where, PartitionSpec("fsdp", "tensor")))
    own = jax.make_mesh((4, 2), ("in", "out"), axis_types=(AxisType.Explicit,) * 2)
    explicit = jax.device_put(unsharded, NamedSharding(own, PartitionSpec("in", "out")))
    equal = {}
    unstructured = functools.partial(weights.unstructured, adapter=None, rules=[".*"], score="W")
    keep = unstructured(unsharded, sparsity=0.2, scope="tensor")
    for name, draw in {
        **{
            scope: functools.partial(unstructured, sparsity=0.4, scope=scope)
            for scope in ("global", "tensor", "output")
        },
        "keep": functools.partial(unstructured, sparsity=0.4, keep=keep),
        "nm": lambda params: weights.nm(params, None, [".*"], score="W"),
    }.items():
        by_call = {"": draw(placed), ", jit": jax.jit(draw)(placed), ", explicit axes": jax.jit(draw)(explicit)}
        for compiled, masks in by_call.items():
            same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), draw(unsharded), masks)
            equal[name + compiled] = all(jax.tree.leaves(same))
    ranks = [leaf.view(jnp.uint32) for leaf in jax.tree.leaves(placed)]
    k, bound = counts.of(7), jnp.uint32(7)
    texts = [
        jax.jit(topk._bound).lower(ranks, k).compile().as_text(),
        topk._take.lower(ranks[0], bound, k, k).compile().as_text(),
    ]
    sent = [row for text in texts for row in hlo.collectives(text, where.shape)]
    gathers = [row.shape for row in sent if row.kind == "all-gather"]
    return equal | {"gathered": gathers, "reduced": any(row.kind == "all-reduce" for row in sent)}


class Layers(nn.Module):
    """A Dense with its own product, and layers beside whose output the update is added."""

    @nn.compact
    def __call__(self, x):
        h = jnp.tanh(nn.Dense(32, name="up")(x))
        h = nn.DenseGeneral((4, 8), name="heads")(nn.Dense(32, precision="highest", name="precise")(h) + h)
        return nn.DenseGeneral(16, axis=(-2, -1), name="down")(h) + nn.Einsum((16, 16), "abc,cd->abd", name="einsum")(x)


class Module(nnx.Module):
    def __init__(self, params):
        self.up = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
        self.up.kernel.set_value(params["up"]["kernel"])
        self.up.bias.set_value(params["up"]["bias"])

    def __call__(self, x):
        return self.up(x)


def computed(model, names, params, adapter, x, key):
    """Return results of functions of updates, of all or of those with the names; ``adapter`` is random."""

    def run(deltas, params=params, x=x):
        return dsee_jax.apply(model, params, adapter.replace(deltas=deltas), x)

    def loss(deltas, params=params, x=x):
        return jnp.sum(jnp.sin(run(deltas, params, x)))

    def attached():
        up = adapter.replace(deltas={"up": deltas["up"]}, supports={"up": adapter.supports["up"]}, orientations=())
        return dsee_jax.nnx.attach(Module(params), up)(x)

    deltas, rules = adapter.deltas, [".*/kernel"]
    masks = functools.partial(weights.unstructured, params, adapter, rules, score="NABS")
    results = {
        "init": lambda: create.init(params, UPDATES, key=key).supports,
        "materialize": lambda: dsee_jax.materialize(params, adapter),
        "apply": lambda: run(deltas),
        "grad": lambda: jax.grad(loss, (0, 1, 2))(deltas, params, x),
        "jvp": lambda: jax.jvp(run, (deltas,), (deltas,))[1],
        "vmap": lambda: jax.vmap(jax.grad(loss))(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), deltas)),
        "sgd": lambda: jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, deltas, jax.grad(loss)(deltas)),
        "nnx": attached,
        "pruned": lambda: masks(scope="output"),
        "pruned, global": lambda: masks(scope="global"),
        "2:4": lambda: weights.nm(params, adapter, rules),
    }
    return {name: results[name]() for name in names or results}


def stepped(kernel, delta, support, x):
    """Return an update after an eager step of gradient descent."""

    def loss(delta):
        return jnp.sum(jnp.sin(dense.dense(x, kernel, None, delta, support, scale=2.0)))

    return jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, delta, jax.grad(loss)(delta))


UPDATES = DeltaConfig(
    targets=(
        "(up|precise|einsum)/kernel",
        ("heads", {"orientation": "in_out_out"}),
        ("down", {"orientation": "in_in_out"}),
    ),
    rank=2,
    nonzeros=9,
    alpha=2.0,
)

EXPLICIT = {
    "columns": {"up": (None, "model"), "heads": (None, None, "model"), "einsum": (None, "model")},
    "rows, and the axis of the batch": {"up": ("model", "data"), "heads": (None, "model"), "einsum": ("model",)},
}
"""The explicit axes of kernels; other kernels are replicated."""


def explicit(_, layouts=tuple(EXPLICIT), names=None):
    """Compare functions of updates on a mesh of explicit axes with one device; return the largest errors."""
    model, key = Layers(), jax.random.key(0)
    x = jax.random.normal(key, (8, 4, 16))
    params = model.init(key, x)["params"]
    adapter = create.init(params, UPDATES, key=key)
    adapter = adapter.replace(
        deltas=jax.tree.map(lambda leaf: 0.1 * jax.random.normal(key, leaf.shape), adapter.deltas)
    )
    compute = jax.jit(functools.partial(computed, model, names))
    up = params["up"]["kernel"], adapter.deltas["up"]["kernel"], adapter.supports["up"]["kernel"], x
    expected = jax.device_get(compute(params, adapter, x, key) | {"eager": stepped(*up)})
    where, errors = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2), {}

    def compare(name, results):
        for call, result in results.items():
            difference = jax.tree.map(
                lambda a, b: np.abs(np.subtract(a, b, dtype=np.float32)).max(), expected[call], result
            )
            errors[f"{name}, {call}"] = float(max(jax.tree.leaves(difference)))

    for name in layouts:
        specs = EXPLICIT[name]
        with jax.set_mesh(where):
            placed = jax.tree.map(lambda leaf: jax.device_put(leaf, PartitionSpec()), params)
            for path, spec in specs.items():
                placed[path]["kernel"] = jax.device_put(params[path]["kernel"], PartitionSpec(*spec))
            batch = jax.device_put(x, PartitionSpec("data"))
            compare(name, compute(placed, adapter, batch, key))
            # The adapter is on one device: its gradients are on the mesh.
            compare(name, {"eager": stepped(placed["up"]["kernel"], *up[1:3], batch)})
    return errors


def generation(_):
    """Count the tokens that are generated on a mesh and are not those of complete passes without a cache, and list the
    queries, keys and values that are gathered along ``tensor``."""
    model, params, _, batch = build("llama")
    where, new, rows = mesh((2, 2, 2)), 4, batch["input_ids"][:, :7]
    placed = sharding.place(sharding.placement(where, model), {"params": params})["params"]
    prompts = sharding.split(where, rows)
    tokens = {beams: dsee_jax.generate(model, placed, prompts, new_tokens=new, beams=beams) for beams in (1, 2)}
    alone, complete = dsee_jax.generate(model, params, rows, new_tokens=new, beams=2), rows
    apply = jax.jit(model.apply)
    for _ in range(new):
        last = np.asarray(apply({"params": params}, complete))[:, -1]
        complete = np.concatenate([complete, last.argmax(-1)[:, None].astype(np.int32)], 1)
    ones, sent = sharding.split(where, np.ones_like(rows)), []
    for beams in (1, 2):
        options = decoding.Options(new_tokens=new, beams=beams)
        program = decoding._generate.lower(model, options, placed, None, prompts, ones, jax.random.key(0)).compile()
        sent += [row for row in hlo.collectives(program.as_text(), where.shape) if row.axes == ("tensor",)]
    gathers, size = [row.shape for row in sent if row.kind == "all-gather"], str(model.config.head_size)
    # Behind the rows, of which a device may have as many.
    sizes = {shape: re.findall(r"\d+", shape.partition("[")[2])[1:] for shape in gathers}
    # Complete, or divided over fsdp.
    whole = {
        f"f32[{rows // parts},{columns}]" for rows, columns in map(np.shape, layer_kernels(params)) for parts in (1, 2)
    }
    return {
        "greedy": int((tokens[1] != complete[:, -new:]).sum()),
        "beams": int((tokens[2] != alone).sum()),
        "collectives": len(sent) > 0,
        "gathered": [shape for shape in gathers if size in sizes[shape] or shape in whole],
    }


def evaluation(folder):
    """Return the `communication` of an evaluation step on a mesh of all three axes."""
    tiny.bert(folder / "evaluated", head=False, **SIZES)
    config = runs.config(
        folder,
        **{"model__path": str(folder / "evaluated"), "delta__targets": list(DELTA.targets)},
        **{"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    )
    steps, placed = plan.abstract_steps(config, jax.devices())
    run, arguments = steps["evaluate"]
    text = jax.jit(run).lower(*arguments).compile().as_text()
    return communication(text, tuple(placed.mesh.shape.values()), arguments[1].params, 1)


def loading(folder):
    """Whether all params that are loaded are on the default device of the caller, and free to move to another."""
    tiny.bert(folder / "loaded")
    with jax.default_device(jax.devices()[3]), mock.patch.object(hf, "_LARGE", 0):
        _, params = dsee_jax.load_pretrained(folder / "loaded")
    leaves = jax.tree.leaves(params)
    return {
        "there": all(leaf.devices() == {jax.devices()[3]} for leaf in leaves),
        "free": not any(leaf.committed for leaf in leaves),
    }


def all_runs(folder, names=None):
    """The figures of complete runs on a mesh of all three axes."""
    figures = {}
    for name in names or RUNS:
        pruned = RUNS[name]
        config = runs.config(
            folder, **pruned, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, output_dir=str(folder / name)
        )
        loop.run(config, say=lambda text: None)
        figures[name] = runs.figures(folder / name)
    return figures


RUNS = {
    "unstructured": {"prune__sparsity": 0.5, "delta__support": "grebsmo"},
    "structured": {
        "prune__kind": "structured",
        "prune__heads": 1,
        "prune__neurons": 0.25,
        "prune__scope": "tensor",
        "train__distill__weight": 0.5,
        "train__distill__hidden": 1.0,
        "train__distill__attention": 1.0,
    },
    "cubic": {
        "prune__sparsity": 0.5,
        "prune__schedule": "cubic",
        "prune__schedule_updates": 3,
        "prune__score": "WANDA",
        "prune__scope": "output",
        "train__distill__weight": 0.5,
    },
}

JOBS = {
    "functions": lambda folder: {
        "pruning": pruning(folder),
        "explicit": explicit(folder, ("rows, and the axis of the batch",), ("materialize", "apply", "grad", "pruned")),
        "generation": generation(folder),
        "evaluation": evaluation(folder),
        "loading": loading(folder),
    },
    "explicit": explicit,
    "steps": all_steps,
    "runs": all_runs,
    # A sample: an encoder and scanned layers on a mesh of all three axes; a run with structured pruning.
    "some steps": lambda folder: all_steps(folder, ("bert", "llama, scanned"), ((2, 2, 2),)),
    "some runs": lambda folder: all_runs(folder, ("structured",)),
}


if __name__ == "__main__":
    print(json.dumps(JOBS[sys.argv[1]](pathlib.Path(sys.argv[2]))))
