"""The plan of a run against the arrays and the program of the run itself."""

import json
import math
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import decoders
import runs
import tiny
from dsee_jax import __main__ as command
from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.plan import roofline, run
from dsee_jax.train import config_file, programs, pruning, setup, step


def planned(folder, **overrides):
    """A config without pruning, with batches of 4 rows."""
    return runs.config(folder, **({"prune__kind": "none", "train__batch_size": 4} | overrides))


def test_trained_parameters_and_argument_bytes_equal_those_of_the_run(tmp_path):
    """Counts and bytes of the abstract arguments equal those of the run's arrays."""
    config = planned(tmp_path)
    figures = run.plan(config)
    begun = setup.prepare(config)
    leaves = jax.tree.leaves(begun.trained)
    assert figures["trained"] == sum(leaf.size for leaf in leaves)
    compiled = programs.make_programs(begun)
    state = jax.eval_shape(lambda: {"trained": begun.trained, "optimizer": compiled.optimizer.init(begun.trained)})
    frozen = [
        leaf for path, leaf in tree.flatten(begun.params).items() if path not in tree.flatten(begun.trained["params"])
    ]
    resident = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in [*jax.tree.leaves(state), *frozen])
    resident += sum(leaf.nbytes for leaf in jax.tree.leaves(begun.supports))
    batch = 4 * 16 * 4 * 3 + 4 * 4 * 2
    # Step, key and rate add a few bytes; the compiler drops arguments that the program does not read.
    assert resident <= figures["bytes_per_chip"]["arguments"] <= resident + batch + 64
    assert figures["bytes_per_chip"]["total"] >= resident + figures["bytes_per_chip"]["temporaries"]
    assert figures["fits"] is None  # the memory of a CPU is unknown
    everything = sum(leaf.size for leaf in jax.tree.leaves(begun.params))
    assert figures["optimizer_bytes"] == {"this": 8 * figures["trained"], "full tuning": 8 * everything}


@pytest.mark.slow
def test_scanned_layers_count_per_iteration(tmp_path):
    """The program of a scanned decoder has one layer; the plan counts all layers."""
    decoders.write(tmp_path / "base", **decoders.VARIANTS["llama"])
    common = runs.causal_lm(tmp_path, prune__kind="none", generate__new_tokens=0)
    separate, scanned = (run.plan(runs.config(tmp_path, **common, model__scan=scan)) for scan in (False, True))
    # The loop also computes the gradient with respect to the input of the first layer, which is unused.
    assert separate["flops"] < scanned["flops"] < 1.1 * separate["flops"]
    assert scanned["trained"] == separate["trained"]


def test_plan_has_the_evaluation_step(tmp_path):
    """An evaluation step has no moments, no backward pass, and no collectives on one device."""
    figures = run.plan(planned(tmp_path))
    evaluation = figures["evaluate"]
    assert evaluation["bytes_per_chip"]["arguments"] < figures["bytes_per_chip"]["arguments"]
    # The backward pass computes gradients of activations down to the lowest update: less than two forward passes.
    assert 1.2 < figures["flops"] / evaluation["flops"] < 3.0
    assert evaluation["collectives"] == []


@pytest.mark.slow
def test_teacher_in_the_step_counts_with_its_memory_and_its_forward_pass(tmp_path):
    """Its weights are those that pruning changes, and the trained values; a forward pass without dropout comes to a step."""
    plain = run.plan(planned(tmp_path))
    distilled = {"prune__kind": "unstructured", "train__distill__weight": 0.5, "train__distill__hidden": 1.0}
    config = planned(tmp_path, **distilled)
    figures, begun = run.plan(config), setup.prepare(config)
    prunable = sum(leaf.nbytes for path, leaf in tree.flatten(begun.params).items() if path in begun.prunable)
    held = prunable + sum(leaf.nbytes for leaf in jax.tree.leaves(begun.trained))
    assert figures["teacher"] == {"runs_in_step": True, "bytes_per_chip": held, "disk_bytes_per_example": 0}
    more = figures["bytes_per_chip"]["arguments"] - plain["bytes_per_chip"]["arguments"]
    assert more == pytest.approx(held, abs=2500)  # arguments that the step does not read are dropped
    assert figures["flops"] - plain["flops"] == pytest.approx(plain["evaluate"]["flops"], rel=0.02)
    assert "teacher" not in plain


CUT: dict[str, object] = {"prune__kind": "structured", "delta__targets": ["encoder/.*/kernel"]}
EVERY_WEIGHT: dict[str, object] = {"train__full": True, "delta__rank": 0, "delta__nonzeros": 0}
PRUNED: dict[str, dict[str, object]] = {
    "masks": {"prune__kind": "unstructured"},
    "masks of trained weights": EVERY_WEIGHT | {"prune__kind": "unstructured"},
    "heads": CUT | {"prune__heads": 1},
    "all units": CUT | {"prune__target__parameters": 0.5, "prune__target__hidden": True},
    "all units of trained weights": CUT
    | EVERY_WEIGHT
    | {"prune__target__parameters": 0.5, "prune__target__hidden": True},
}
QUICK = "masks of trained weights", "all units"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow) for kind in PRUNED]
)
def test_arrays_of_a_teacher_are_those_that_the_student_does_not_share(tmp_path, kind):
    """A cut also changes biases, supports and, with hidden dimensions, embeddings; the plan is compared with the arrays."""
    config = planned(tmp_path, train__distill__weight=0.5, train__distill__hidden=1.0, **PRUNED[kind])
    train, args = run.abstract_steps(config, jax.devices()[:1])[0]["train"]
    begun = setup.prepare(config)
    kept: dict[str, Any] = {"heads": {"layer_0": np.arange(3) > 0}}
    if config.prune.target.kind:
        kept |= {"neurons": {"layer_0": np.arange(40) > 0}, "hidden": np.arange(24) > 0}
    flat = tree.flatten(begun.params)
    masks = tree.unflatten({path: jnp.ones(flat[path].shape, bool) for path in begun.prunable})
    student, _, masks = pruning.apply_cut(begun, begun.trained, kept if config.prune.kind == "structured" else masks)
    whole, frozen = pruning.freeze(begun, {}), pruning.freeze(student, masks)
    shared = {id(leaf) for leaf in jax.tree.leaves(frozen)}
    own = [leaf for leaf in jax.tree.leaves((begun.trained, whole)) if id(leaf) not in shared]
    assert run.teacher_bytes(*args)["bytes_per_chip"] == sum(leaf.nbytes for leaf in own)
    assert jax.tree.map(jnp.shape, args[1].masks) == jax.tree.map(jnp.shape, frozen.masks)
    assert jax.eval_shape(train, *args)[1].shape == ()


def test_bytes_of_a_teacher_are_those_of_one_chip():
    mesh = jax.sharding.AbstractMesh((4, 2), ("fsdp", "tensor"))
    arrays = {
        spec: jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
        for spec in ((), ("fsdp",), ("fsdp", "tensor"))
    }
    counted = run.teacher_bytes(None, None, {}, None, None, step.Teacher(0.5, arrays[()], [*arrays.values()][1:]))
    assert counted == {"runs_in_step": True, "bytes_per_chip": 2 * (48 + 12 + 6), "disk_bytes_per_example": 0}


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_outputs_of_a_teacher_count_on_disk(tmp_path, kind):
    distilled = {"prune__kind": "unstructured", "train__distill__weight": 0.5}
    if kind == "tokens":
        decoders.write(tmp_path / "base", **decoders.VARIANTS["llama"])
        distilled |= runs.causal_lm(tmp_path, generate__new_tokens=0) | {"train__distill__top_k": 5}
    config = planned(tmp_path, **distilled)
    steps, _ = run.abstract_steps(config, jax.devices()[:1])
    _, args = steps["train"]
    each = 2 * 4 if kind == "classes" else config.data.max_length * (8 * 5 + 4)
    assert run.teacher_bytes(*args) == {"runs_in_step": False, "bytes_per_chip": 0, "disk_bytes_per_example": each}
    assert jax.eval_shape(*steps["train"][:1], *args)[1].shape == ()


def test_verb_prints_and_writes_equal_figures(tmp_path, capsys):
    config = planned(tmp_path)
    (tmp_path / "run.yaml").write_text(config_file.dump(config))
    out = tmp_path / "plan.json"
    assert command.main(["plan", str(tmp_path / "run.yaml"), "--json", str(out), "--train.batch_size=2"]) == 0
    output, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert figures["rows"] == 2
    assert f"{figures['trained']:,}" in output
    assert not (tmp_path / "run").exists()
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["train"]["batch_size"] == 4


def test_plan_needs_only_a_config(tmp_path):
    """No weights, no data, no tokenizer."""
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.config()))
    config = config_file.read(
        None, [f"model.path={folder}", "data.max_length=16", "train.batch_size=4", "delta.rank=2"]
    )
    assert run.plan(config)["trained"] > 0


def test_roofline_and_fit_for_a_chip(tmp_path, monkeypatch, capsys):
    """The bound of a chip with one slow component, and a chip with too little memory."""
    monkeypatch.setattr(roofline, "devices", lambda topology: jax.devices()[:1])
    config = planned(tmp_path)
    slow = {"compute": {"flops": 1.0}, "memory": {"bandwidth": 1.0}}
    for bound, change in slow.items():
        chip = roofline.Chip(1e12, 1e30, 1e30, 1e30, 2)._replace(**change)
        monkeypatch.setitem(roofline.CHIPS, "v5e", chip)
        figures = run.plan(config, "v5e:1x1")
        assert figures["fits"]
        assert figures["roofline"]["bound"] == bound
        assert (
            figures["roofline"]["step_seconds"]
            == {"compute": figures["flops"], "memory": figures["traffic_bytes_per_chip"]}[bound]
        )
    monkeypatch.setitem(roofline.CHIPS, "v5e", roofline.Chip(1e3, 1e12, 1e12, 1e12, 2))
    assert run.plan(config, "v5e:1x1")["fits"] is False


@pytest.mark.parametrize(
    ("message", "gigabytes"),
    [
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 53.51G of 15.75G.", 53.51),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (134.47G) exceeds available HBM (15.7G).",
            134.47,
        ),
    ],
)
def test_out_of_memory_of_the_compiler_does_not_fit(tmp_path, monkeypatch, message, gigabytes):
    """The messages of the TPU compiler for a program that exceeds the memory."""

    class Refused:
        def lower(self, *args):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(roofline, "devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(jax, "jit", lambda *args, **options: Refused())
    figures = run.plan(planned(tmp_path), "v5e:1x1")
    assert figures["fits"] is False
    assert figures["bytes_per_chip"] == {"total": gigabytes * 1024**3}
    assert [table.title for table in roofline.tables(figures)]


def test_largest_batch_without_a_topology_is_refused(tmp_path):
    with pytest.raises(InputError, match="give --topology, one of v5e"):
        run.largest_batch(planned(tmp_path), "")


@pytest.mark.parametrize(
    ("topology", "message"),
    [("v5:4x4", "unknown chip .* v5e"), ("h100:8", "expected KIND:SHAPE with one of v5e, v5p, v6e")],
)
def test_unknown_topology_is_refused(topology, message):
    with pytest.raises(InputError, match=message):
        roofline.devices(topology)


def test_missing_libtpu_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    from jax.experimental import topologies

    def missing(*args, **options):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"'v5e:4x4' is not available \(no libtpu\): install the extra `tpu`"):
        roofline.devices("v5e:4x4")


def test_largest_batch_fits_both_steps(tmp_path, monkeypatch):
    """The batch size is doubled or halved to the largest one that fits both steps."""
    config, mesh = planned(tmp_path), types.SimpleNamespace(mesh=None)
    monkeypatch.setattr(roofline, "devices", lambda topology: [])
    for train, evaluate, expected in ((37, 99, 32), (99, 37, 32), (3, 99, 2), (0, 99, 0)):
        steps = {"train": train, "evaluate": evaluate}
        monkeypatch.setattr(
            run,
            "abstract_steps",
            lambda config, devices, labels, steps=steps: ({n: (s, config) for n, s in steps.items()}, mesh),
        )
        fits = lambda most, config, mesh, chip, donated: {"fits": config.train.batch_size <= most}
        monkeypatch.setattr(roofline, "analyze", fits)
        assert run.largest_batch(config, "v5e:4x4") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({"data__multi_label": True}, 3),
        ({"data__source": "jsonl", "model__task": "token-classification"}, 3),
        ({"data__source": "squad"}, 2),
    ],
)
def test_steps_of_other_tasks_have_the_shapes_of_their_batches(tmp_path, keys, labels):
    """One loss, and one summary for each row."""
    steps, _ = run.abstract_steps(planned(tmp_path, **keys), jax.devices()[:1], labels=labels)
    _, loss = jax.eval_shape(steps["train"][0], *steps["train"][1])
    assert loss.shape == ()
    assert jax.eval_shape(steps["evaluate"][0], *steps["evaluate"][1]).shape[0] == 4
