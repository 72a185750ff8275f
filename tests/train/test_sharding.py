"""Shardings: the tables on abstract meshes, and complete steps and runs on eight simulated devices."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import meshes
import runs
import tiny
from dsee_jax import models
from dsee_jax.config import MeshConfig, TrainConfig
from dsee_jax.deltas import create
from dsee_jax.errors import InputError
from dsee_jax.runtime import mesh
from dsee_jax.train import loop, optim, sharding, step

P = PartitionSpec


def abstract(data=1, fsdp=1, tensor=1):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES)


def on_eight_devices(job, folder):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = dict(os.environ, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    this = [sys.executable, meshes.__file__, job, str(folder)]
    done = subprocess.run(this, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def model(name="bert", **changes):
    fields = meshes.FAMILIES[name] | changes
    architecture = models.find(fields["model_type"])
    return architecture.model(architecture.config.from_hf(fields), "features")


def test_mesh_sizes_multiply_to_the_devices():
    """The tests have one device."""
    assert dict(sharding.mesh(MeshConfig(-1, 1, 1), batch_size=3).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert dict(sharding.mesh(MeshConfig(1, -1, 1), batch_size=3).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes, message in (
        ((2, 1, 1), "the mesh data 2 x fsdp 1 x tensor 1 does not fit 1 devices: its sizes must multiply to 1"),
        ((-1, 1, 3), "the mesh data -1 x fsdp 1 x tensor 3 does not fit 1 devices"),
        ((-1, -1, 1), "mesh.data and mesh.fsdp are -1; only one axis can take the devices that are left"),
        ((0, 1, 1), "mesh.data is 0; expected a number of devices, or -1"),
    ):
        with pytest.raises(InputError, match=message):
            sharding.mesh(MeshConfig(*sizes), batch_size=8)


class Chip:
    """A TPU device with coordinates, like the devices of a topology."""

    platform, device_kind, core_on_chip, slice_index, process_index = "tpu", "TPU v5 lite", 0, 0, 0

    def __init__(self, number, column, row):
        self.id, self.coords = number, (column, row, 0)


CHIPS = [Chip(4 * row + column, column, row) for row in range(4) for column in range(4)]


def test_mesh_neighbours_are_physical_neighbours(caplog):
    """4 x 4 chips as a mesh of 2 x 8: a mesh axis can extend along one dimension of the torus and part of the other."""
    laid = sharding.mesh(MeshConfig(2, 8, 1), batch_size=16, devices=CHIPS).devices[:, :, 0]
    halves = [{chip.coords for chip in row} for row in laid]
    assert halves == [{(x, y, 0) for x in range(4) for y in rows} for rows in ((0, 1), (2, 3))] or halves == [
        {(x, y, 0) for x in columns for y in range(4)} for columns in ((0, 1), (2, 3))
    ]
    for row in laid:
        places = np.array([chip.coords for chip in row])
        assert (np.abs(np.diff(places[::2], axis=0)).sum(1) == 1).all()
    assert not caplog.records


def test_unknown_links_are_a_warning(monkeypatch, caplog):
    def refuse(*args, **options):
        raise NotImplementedError

    monkeypatch.setattr(mesh.mesh_utils, "create_device_mesh", refuse)
    laid = sharding.mesh(MeshConfig(2, 8, 1), batch_size=16, devices=CHIPS).devices
    assert [chip.id for chip in laid.ravel()] == list(range(16))
    assert "in their own order, not along their links" in caplog.text


def test_shardings_of_params():
    """Width over fsdp; heads, neurons and vocabulary over tensor; vectors of the width are replicated."""
    placed = sharding.placement(abstract(2, 4, 2), model())
    expected = {
        "embeddings/word/embedding": P(None, "fsdp"),  # 37 words are prime
        "embeddings/position/embedding": P(None, "fsdp"),
        "embeddings/norm/scale": P(None),
        "encoder/layer_0/attention/query/kernel": P("fsdp", "tensor"),
        "encoder/layer_0/attention/query/bias": P("tensor"),
        "encoder/layer_1/attention/output/kernel": P("tensor", "fsdp"),
        "encoder/layer_1/mlp/up/kernel": P("fsdp", "tensor"),
        "encoder/layer_1/mlp/down/kernel": P("tensor", "fsdp"),
        "encoder/layer_1/mlp/down/bias": P(None),
    }
    assert {path: placed.specs[path] for path in expected} == expected
    even = sharding.placement(abstract(2, 4, 2), model(vocab_size=40))
    assert even.specs["embeddings/word/embedding"] == P("tensor", "fsdp")
    alone = sharding.placement(abstract(8), model())
    assert {axis for spec in alone.specs.values() for axis in spec} == {None}


def test_layer_axis_of_a_stack_is_not_sharded():
    architecture = models.find("llama")
    stacked = architecture.model(architecture.config.from_hf(meshes.FAMILIES["llama"]), scan=True)
    placed = sharding.placement(abstract(1, 4, 2), stacked)
    assert placed.specs["decoder/layers/attention/value/kernel"] == P(None, "fsdp", "tensor")
    assert placed.specs["decoder/layers/attention_norm/scale"] == P(None, None)


def test_shardings_of_updates_masks_and_moments():
    """Updates, moments and masks are sharded like their kernels; supports and sparse values are replicated."""
    bert = model()
    placed = sharding.placement(abstract(2, 4, 2), bert)
    params = bert.init(jax.random.key(0), np.ones((1, 4), np.int32))["params"]
    adapter = create.init(params, meshes.DELTA, key=jax.random.key(0))
    optimizer = optim.adamw(TrainConfig())
    trained = {"deltas": adapter.deltas, "params": {}}
    state = step.State(np.zeros((), np.int32), trained, optimizer.init(trained))
    kernel = lambda tree: tree["encoder"]["layer_0"]["attention"]["query"]["kernel"]
    moment = next(part.mu for part in sharding.shardings(placed, state).optimizer if hasattr(part, "mu"))
    for shardings in (sharding.shardings(placed, state).trained, moment):
        assert {name: where.spec for name, where in kernel(shardings["deltas"]).items()} == {
            "a": P("fsdp", None),
            "b": P(None, "tensor"),
            "values": P(),
        }
    frozen = sharding.shardings(placed, step.Frozen(params, adapter.supports, {"encoder": params["encoder"]}))
    assert kernel(frozen.params).spec == kernel(frozen.masks).spec == P("fsdp", "tensor")
    assert kernel(frozen.supports).spec == P()


@pytest.mark.parametrize(
    ("axes", "name", "changes", "message"),
    [
        ({"tensor": 3}, "bert", {}, "mesh.tensor is 3; layer 0 has 4 heads, which it does not divide: use 1, 2 or 4"),
        ({"tensor": 4}, "llama", {}, "mesh.tensor is 4; layer 0 has 2 heads, which it does not divide: use 1 or 2"),
        ({"tensor": 4}, "bert", {"intermediate_size": 66}, "mesh.tensor is 4; layer 0 has 66 neurons"),
        (
            {"fsdp": 5},
            "gpt2",
            {},
            "mesh.fsdp is 5; the axis 'embed' of '.*' has 32 entries, which it does not divide: use 1, 2, 4, 8, 16 or 32",
        ),
    ],
)
def test_indivisible_axis_is_named(axes, name, changes, message):
    with pytest.raises(InputError, match=message):
        sharding.placement(abstract(**axes), model(name, **changes))


def test_indivisible_heads_of_a_pruned_model_are_replicated():
    """Three of four heads are kept: attention is replicated over tensor, the width is sharded over fsdp."""
    cut = model()
    cut = cut.clone(config=cut.config.with_widths(heads=[3, 4]))
    placed = sharding.placement(abstract(1, 2, 2), cut)
    assert placed.specs["encoder/layer_0/attention/query/kernel"] == P("fsdp", None)
    assert placed.specs["encoder/layer_0/attention/query/bias"] == P(None)
    # The config of equally pruned layers is that of a smaller model.
    cut = cut.clone(config=model().config.with_widths(neurons=[63, 63]))
    placed = sharding.placement(abstract(1, 2, 2), cut, cut=True)
    assert placed.specs["encoder/layer_0/mlp/up/kernel"] == P("fsdp", None)


def test_indivisible_width_of_a_pruned_model_is_replicated():
    """15 dimensions are left: heads and neurons are sharded over tensor, and nothing over fsdp."""
    narrow = model()
    narrow = narrow.clone(config=narrow.config.with_hidden(15).with_widths(**narrow.config.widths))
    placed = sharding.placement(abstract(1, 2, 2), narrow)
    assert placed.specs["encoder/layer_0/attention/query/kernel"] == P(None, "tensor")
    assert placed.specs["encoder/layer_0/mlp/down/kernel"] == P("tensor", None)


SOME_AND_ALL = [
    pytest.param("some ", marks=pytest.mark.slow, id="some"),
    pytest.param("", marks=pytest.mark.exhaustive, id="all"),
]


@pytest.mark.parametrize("which", SOME_AND_ALL)
def test_steps_on_meshes_equal_one_device(tmp_path, which):
    """Two steps of every architecture on every mesh.

    Only gradients of the head are all-reduced at the size of a kernel. No device gathers a kernel that is sharded over
    ``tensor``, but the pooler's. Over ``fsdp``, each kernel of a layer is gathered once forward and once backward; without
    ``fsdp`` and ``tensor`` nothing is gathered.
    """
    for case, figures in on_eight_devices(f"{which}steps", tmp_path).items():
        assert figures["losses"] < 1e-5, (case, figures)
        assert figures["trained"] < 1e-4, (case, figures)
        assert figures["reduced"] <= figures["head"], (case, figures)
        divided = eval(case[case.index("(") :])
        assert figures["held"] <= 1 / divided[1], (case, figures)
        assert figures["whole"] <= figures["head"], (case, figures)
        assert figures["passes"] <= 2.25, (case, figures)
        assert (figures["gathers"] > 0) == (divided[1:] != (1, 1)), (case, figures)


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    return on_eight_devices("functions", tmp_path_factory.mktemp("functions"))


@pytest.mark.slow
def test_updates_on_explicit_axes_equal_one_device(functions):
    """Folded, attached, derived and scored."""
    errors = functions["explicit"]
    assert len(errors) == 5
    assert {call: error for call, error in errors.items() if error > 1e-4} == {}


@pytest.mark.exhaustive
def test_all_functions_of_updates_on_every_layout_of_explicit_axes_equal_one_device(tmp_path):
    errors = on_eight_devices("explicit", tmp_path)
    assert len(errors) == 24
    assert {call: error for call, error in errors.items() if error > 1e-4} == {}


@pytest.mark.slow
def test_tokens_generated_on_a_mesh_are_those_without_a_cache(functions):
    """The heads are split, and no device gathers those of the others, or a kernel of a layer."""
    assert functions["generation"] == {"greedy": 0, "beams": 0, "collectives": True, "gathered": []}


@pytest.mark.slow
def test_evaluation_on_a_mesh_gathers_each_kernel_once(functions):
    """Over ``fsdp``; nothing of the size of a kernel is gathered over ``tensor``, or all-reduced."""
    figures = functions["evaluation"]
    assert (figures["reduced"], figures["whole"]) == (0, 0)
    assert 0.5 <= figures["passes"] <= 1.1


@pytest.mark.slow
def test_params_are_loaded_on_the_default_device_of_the_caller(functions):
    """By threads, which do not inherit it."""
    assert functions["loading"] == {"there": True, "free": True}


@pytest.mark.slow
def test_masks_of_sharded_kernels_equal_one_device(functions):
    """Eagerly and under jit; the devices add their counts, and none gathers a complete kernel."""
    figures = dict(functions["pruning"])
    assert figures.pop("gathered") == []
    assert figures.pop("reduced")
    kinds = ("global", "tensor", "output", "keep", "nm")
    assert figures == {f"{kind}{call}": True for kind in kinds for call in ("", ", jit", ", explicit axes")}


@pytest.mark.parametrize("which", SOME_AND_ALL)
def test_run_on_a_mesh_equals_one_device(tmp_path, which):
    """Tuning, pruning and re-tuning over data 2 x fsdp 2 x tensor 2."""
    tiny.bert(tmp_path / "base", num_hidden_layers=1, head=False, **meshes.SIZES)
    runs.table(tmp_path / "data")
    results = on_eight_devices(f"{which}runs", tmp_path)
    for name in results:
        config = runs.config(tmp_path, **meshes.RUNS[name], output_dir=str(tmp_path / f"{name} alone"))
        loop.run(config, say=lambda text: None)
        alone = runs.figures(tmp_path / f"{name} alone")
        for here, there in zip(alone["stages"], results[name]["stages"], strict=True):
            assert there["metrics"] == pytest.approx(here["metrics"], rel=1e-4), name
        for key in ("weight_sparsity", "kept", "flops_per_token", "model_bytes"):
            assert results[name][key] == alone[key], (name, key)
