"""What a run takes, said ahead of time: against arrays counted by hand and against the program that a run compiles."""

import json
import math
import sys
import types

import jax
import pytest
import yaml

import decoders
import runs
import tiny
from dsee_jax import __main__ as command
from dsee_jax import tree
from dsee_jax.errors import InputError
from dsee_jax.plan import roofline, run
from dsee_jax.train import config_file, programs, setup


def asked(folder, **overrides):
    """A config whose rows are all as long as they may be."""
    return runs.config(folder, **({"prune__kind": "none", "train__batch_size": 4} | overrides))


def test_what_is_trained_and_held_is_that_of_the_run(tmp_path):
    """Counts and bytes of the arguments are those of the arrays of the run itself; nothing of it is read."""
    config = asked(tmp_path)
    found = run.plan(config)
    begun = setup.prepare(config)
    leaves = jax.tree.leaves(begun.trained)
    assert found["trained"] == sum(leaf.size for leaf in leaves)
    compiled = programs.make_programs(begun)
    state = jax.eval_shape(lambda: {"trained": begun.trained, "optimizer": compiled.optimizer.init(begun.trained)})
    frozen = [
        leaf for path, leaf in tree.flatten(begun.params).items() if path not in tree.flatten(begun.trained["params"])
    ]
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in [*jax.tree.leaves(state), *frozen])
    held += sum(leaf.nbytes for leaf in jax.tree.leaves(begun.supports))
    batch = 4 * 16 * 4 * 3 + 4 * 4 * 2
    # The step, the key and the rate; and what the compiler drops because the program does not read it.
    assert held <= found["bytes_per_chip"]["arguments"] <= held + batch + 64
    assert found["bytes_per_chip"]["total"] >= held + found["bytes_per_chip"]["temporaries"]
    assert found["fits"] is None  # nobody knows the memory of this machine's processor
    everything = sum(leaf.size for leaf in jax.tree.leaves(begun.params))
    assert found["optimizer_bytes"] == {"this": 8 * found["trained"], "full tuning": 8 * everything}


def test_scanned_layers_count_as_often_as_they_run(tmp_path):
    """The program of a deep decoder has one layer in it; the plan has all."""
    decoders.write(tmp_path / "base", **decoders.VARIANTS["llama"])
    common = runs.writing(tmp_path, prune__kind="none", generate__new_tokens=0)
    apart, scanned = (run.plan(runs.config(tmp_path, **common, model__scan=scan)) for scan in (False, True))
    # A loop sends a gradient out of the first layer too, which nobody asks for.
    assert apart["flops"] < scanned["flops"] < 1.1 * apart["flops"]
    assert scanned["trained"] == apart["trained"]


def test_evaluating_is_planned_too(tmp_path):
    """It holds what training holds less the moments, computes forwards alone, and sends nothing on one device."""
    found = run.plan(asked(tmp_path))
    scored = found["evaluate"]
    assert scored["bytes_per_chip"]["arguments"] < found["bytes_per_chip"]["arguments"]
    # Backwards go the gradients of activations, down to the lowest update: less than twice as much as forwards.
    assert 1.2 < found["flops"] / scored["flops"] < 3.0
    assert scored["collectives"] == []


def test_the_verb_writes_what_it_prints(tmp_path, capsys):
    config = asked(tmp_path)
    (tmp_path / "run.yaml").write_text(config_file.dump(config))
    out = tmp_path / "plan.json"
    assert command.main(["plan", str(tmp_path / "run.yaml"), "--json", str(out), "--train.batch_size=2"]) == 0
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["rows"] == 2
    assert f"{found['trained']:,}" in said
    assert not (tmp_path / "run").exists()
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["train"]["batch_size"] == 4


def test_a_config_alone_is_enough(tmp_path):
    """Neither weights nor data nor a tokenizer need be there."""
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.config()))
    config = config_file.read(
        None, [f"model.path={folder}", "data.max_length=16", "train.batch_size=4", "delta.rank=2"]
    )
    assert run.plan(config)["trained"] > 0


def test_against_a_chip(tmp_path, monkeypatch, capsys):
    """Fits or not, the roofline and its bound, for a chip that is slow in one thing at a time."""
    monkeypatch.setattr(roofline, "devices", lambda topology: jax.devices()[:1])
    config = asked(tmp_path)
    slow = {"computing": {"flops": 1.0}, "memory": {"bandwidth": 1.0}}
    for bound, change in slow.items():
        chip = roofline.Chip(1e12, 1e30, 1e30, 1e30, 2)._replace(**change)
        monkeypatch.setitem(roofline.CHIPS, "v5e", chip)
        found = run.plan(config, "v5e:1x1")
        assert found["fits"]
        assert found["roofline"]["bound"] == bound
        assert (
            found["roofline"]["step_seconds"]
            == {"computing": found["flops"], "memory": found["traffic_bytes_per_chip"]}[bound]
        )
    monkeypatch.setitem(roofline.CHIPS, "v5e", roofline.Chip(1e3, 1e12, 1e12, 1e12, 2))
    assert run.plan(config, "v5e:1x1")["fits"] is False


@pytest.mark.parametrize(
    ("said", "gigabytes"),
    [
        ("XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 53.51G of 15.75G.", 53.51),
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (134.47G) exceeds available HBM (15.7G).",
            134.47,
        ),
    ],
)
def test_what_the_compiler_refuses_does_not_fit(tmp_path, monkeypatch, said, gigabytes):
    """The messages of a TPU's compiler, which stops at a program that is larger than the memory."""

    class Refused:
        def lower(self, *args):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}")

    monkeypatch.setattr(roofline, "devices", lambda topology: jax.devices()[:1])
    monkeypatch.setattr(jax, "jit", lambda *args, **options: Refused())
    found = run.plan(asked(tmp_path), "v5e:1x1")
    assert found["fits"] is False
    assert found["bytes_per_chip"] == {"total": gigabytes * 1024**3}
    assert [table.title for table in roofline.tables(found)]


def test_the_largest_batch_needs_a_known_chip(tmp_path):
    with pytest.raises(InputError, match="give --topology, one of v5e"):
        run.largest(asked(tmp_path), "")


@pytest.mark.parametrize(
    ("topology", "message"),
    [("v5:4x4", "no such chip .* v5e"), ("h100:8", "expected KIND:SHAPE with one of v5e, v5p, v6e")],
)
def test_a_topology_that_nobody_makes(topology, message):
    with pytest.raises(InputError, match=message):
        roofline.devices(topology)


def test_without_the_compiler_of_tpus(monkeypatch):
    """The way out is named."""
    monkeypatch.setitem(sys.modules, "libtpu", None)
    from jax.experimental import topologies

    def missing(*args, **options):
        raise RuntimeError("no libtpu")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"'v5e:4x4' cannot be had \(no libtpu\): install the extra `tpu`"):
        roofline.devices("v5e:4x4")


def test_the_largest_batch_is_found_by_halves_and_doubles(tmp_path, monkeypatch):
    """Of the rows that fit both steps."""
    config, mesh = asked(tmp_path), types.SimpleNamespace(mesh=None)
    monkeypatch.setattr(roofline, "devices", lambda topology: [])
    for train, evaluate, expected in ((37, 99, 32), (99, 37, 32), (3, 99, 2), (0, 99, 0)):
        steps = {"train": train, "evaluate": evaluate}
        monkeypatch.setattr(
            run,
            "abstract",
            lambda asked, found, labels, steps=steps: ({n: (s, asked) for n, s in steps.items()}, mesh),
        )
        fits = lambda most, asked, mesh, chip, donated: {"fits": asked.train.batch_size <= most}
        monkeypatch.setattr(roofline, "compiled", fits)
        assert run.largest(config, "v5e:4x4") == expected
