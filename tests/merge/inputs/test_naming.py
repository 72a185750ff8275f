"""One spelling for all models of a merge: the first model's names, and the buffers that all have."""

from pathlib import Path

import numpy as np

import checkpoints
import tiny
from merge import __main__ as command
from merge.inputs import naming
from merge.inputs.lazy import from_array
from merge.inputs.sources import Source


def opened(name, prefix="", buffers=(), layers=2):
    """A model of a few tensors."""
    names = [f"{prefix}embed.weight", *(f"{prefix}layers.{number}.mlp.weight" for number in range(layers))]
    shapes = dict.fromkeys(names, (4, 4)) | {
        f"{prefix}layers.{number}.{buffer}": (4,) for number in range(layers) for buffer in buffers
    }
    return Source(
        name, Path(name), {}, {key: from_array(np.zeros(shape), Path()) for key, shape in shapes.items()}, {}, {}
    )


def test_names_are_those_of_the_first_model():
    """Also of layers that it lacks; the notes say so."""
    (a, b), notes = naming.unified([opened("a", "model."), opened("b", layers=4)])
    assert [*b.tensors] == [*opened("", "model.", layers=4).tensors]
    assert a.tensors.keys() < b.tensors.keys()
    assert notes == ["b: 5 names are spelled otherwise: embed.weight is model.embed.weight in a"]
    assert naming.unified([a, a])[1] == []


def test_buffers_that_some_lack_are_left_out():
    """In every layer of every model; the others are kept, whatever the numbers of layers."""
    models = [opened("a", buffers=["inv_freq", "masked_bias"]), opened("b", "x.", buffers=["inv_freq"], layers=3)]
    (a, b), notes = naming.unified(models)
    assert [name for name in b.tensors if "layers.2" in name] == ["layers.2.mlp.weight", "layers.2.inv_freq"]
    assert not any("masked_bias" in name for name in a.tensors)
    assert notes[-1] == "buffers that not all models store are left out: layers.#.masked_bias"
    assert [*naming.unified(models[:1])[0][0].tensors] == [*models[0].tensors]


def test_merge_of_two_spellings_is_the_merge_of_one(tmp_path):
    """From files to files; filters of the recipe see the names of the base."""
    for name, changes in {
        "base": {},
        "same": {"seed": 1},
        "bare": {"seed": 1, "prefix": False, "old_names": True},
    }.items():
        tiny.bert(tmp_path / name, head=False, **changes)
    for name in ("same", "bare"):
        recipe = tmp_path / f"{name}.yml"
        weight = "[{filter: bert.encoder, value: 0.5}, {value: 1}]"
        recipe.write_text(
            f"merge_method: task_arithmetic\nbase_model: base\nmodels: [{{model: {name}, parameters: {{weight: {weight}}}}}]\n"
        )
        assert command.main([str(recipe), str(tmp_path / f"{name}_out")]) == 0
    same, bare = (checkpoints.load(tmp_path / f"{name}_out") for name in ("same", "bare"))
    assert same.keys() == bare.keys()
    for name, array in same.items():
        np.testing.assert_array_equal(array, bare[name])
