"""The folder of an adapter: write and read, and errors of damaged files."""

import hashlib
import json
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dsee_jax import tree
from dsee_jax.ckpt import adapted, adapter, packed_masks, tensors
from dsee_jax.config import DeltaConfig
from dsee_jax.errors import InputError

RANDOM = np.random.default_rng(0)
FULL = adapter.Saved(
    deltas={
        "encoder": {
            "query": {
                "kernel": {
                    # A transposed view.
                    "a": RANDOM.normal(size=(2, 5)).astype(np.float32).T,
                    "b": RANDOM.normal(size=(2, 4)).astype(np.float32),
                    "values": RANDOM.normal(size=3).astype(np.float32),
                }
            }
        }
    },
    supports={"encoder": {"query": {"kernel": np.array([[0, 1], [2, 3], [4, 0]], np.int32)}}},
    params={"classifier": {"bias": np.ones(2, np.float32)}},
    masks={"encoder": {"query": {"kernel": RANDOM.random((5, 4)) < 0.5}}},
    config={"scale": 2.0, "scale_sparse": True, "labels": ["no", "yes"]},
    kept={"heads": {"layer_0": np.array([True, False, True])}},
)

LOW_RANK = FULL._replace(
    deltas={"encoder": {"query": {"kernel": {"a": np.ones((5, 2), np.float32), "b": np.ones((2, 4), np.float32)}}}},
    supports={},
    params={},
)


def equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


@pytest.mark.parametrize("saved", [FULL, FULL._replace(masks={}, kept={}), LOW_RANK])
def test_adapter_is_read_back(tmp_path, saved):
    adapter.save(tmp_path, saved)
    equal(adapter.load(tmp_path), saved)
    assert (tmp_path / "masks.safetensors").exists() == bool(saved.masks)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors"])
def test_missing_file_is_named(tmp_path, name):
    adapter.save(tmp_path, FULL)
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        adapter.load(tmp_path)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter.safetensors", "masks.safetensors"])
@pytest.mark.parametrize("left", [0, 9, 60])
def test_truncated_file_is_an_error(tmp_path, name, left):
    adapter.save(tmp_path, FULL)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: min(left, path.stat().st_size - 4)])
    with pytest.raises(InputError, match=str(tmp_path)):
        adapter.load(tmp_path)


def test_fingerprint_covers_the_weights(tmp_path):
    """SHA-256 over all shards in the order of their names, and over no other file."""
    for name, content in (("model-2.safetensors", b"b"), ("model-1.safetensors", b"a"), ("config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
    assert adapter.fingerprint(tmp_path) == hashlib.sha256(b"ab").hexdigest()


def test_adapter_of_an_earlier_version_fits_the_model_of_its_run(tmp_path):
    """It records the base only."""
    recorded = {"base_sha256": "a" * 64}
    adapter.check_base(tmp_path / "run/adapter", recorded, tmp_path / "run/model", "c" * 64, allow="--flag")
    with pytest.raises(InputError, match="other weights"):
        adapter.check_base(tmp_path / "run/adapter", recorded, tmp_path / "model", "c" * 64, allow="--flag")


def test_weights_that_the_model_does_not_read_have_no_fingerprint(tmp_path):
    tensors.write(tmp_path, {"x": np.ones(3, np.float32)})
    before = adapter.fingerprint(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"other")
    assert adapter.fingerprint(tmp_path) == before


def test_adapter_on_other_weights_is_an_error(tmp_path):
    """It belongs to the pretrained model and to the model of its run; an adapter without hashes fits every model."""
    recorded = {"base_sha256": "a" * 64, "model_sha256": "b" * 64}
    for sha256, config in (("a" * 64, recorded), ("b" * 64, recorded), ("c" * 64, {})):
        adapter.check_base(tmp_path, config, "base", sha256, allow="--flag")
    with pytest.raises(InputError, match="those of base: SHA-256 aaaaaaaaaaaa by .* cccccccccccc there; .* or --flag"):
        adapter.check_base(tmp_path, recorded, "base", "c" * 64, allow="--flag")


def edited(part, value):
    """The full adapter with another value, or without a value, at one leaf of its update."""
    flat = tree.flatten({"deltas": FULL.deltas, "supports": FULL.supports, "params": FULL.params})
    name = next(path for path in flat if path.endswith(part))
    flat = {path: value if path == name else leaf for path, leaf in flat.items()}
    rest = tree.unflatten({path: leaf for path, leaf in flat.items() if leaf is not None})
    return FULL._replace(**({"deltas": {}, "supports": {}, "params": {}} | rest))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "holds a list"),
        ({}, "scale is None"),
        *(
            ({"scale": scale, "scale_sparse": True}, f"scale is {scale!r}")
            for scale in (math.nan, math.inf, -1.0, "2", True)
        ),
        ({"scale": 10**400, "scale_sparse": True}, "scale is 1000"),
        ({"scale": 1.0}, "scale_sparse is None"),
    ],
)
def test_damaged_config_is_one_line(tmp_path, config, message):
    adapter.save(tmp_path, FULL)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{tmp_path}: damaged adapter: .*{message}"):
        adapter.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("/a", None, "'encoder/query/kernel' is incomplete"),
        ("/values", None, "is incomplete"),
        ("query/kernel", None, "is incomplete"),
        ("/a", np.ones((5, 3), np.float32), "is incomplete"),
        ("/b", np.ones(4, np.float32), "is incomplete"),
        ("/values", np.ones(2, np.float32), "is incomplete"),
        ("query/kernel", np.array([[0, 1], [2, 3], [-1, 0]], np.int32), "is incomplete"),
        ("query/kernel", np.zeros((3, 3), np.int32), "is incomplete"),
        (
            "/b",
            np.full((2, 4), np.inf, np.float32),
            "'deltas/encoder/query/kernel/b' holds numbers that are not finite",
        ),
        ("bias", np.full(2, np.nan, np.float32), "'params/classifier/bias' holds numbers that are not finite"),
    ],
)
def test_damaged_update_is_one_line(tmp_path, part, value, message):
    adapter.save(tmp_path, edited(part, value))
    with pytest.raises(InputError, match=f"{tmp_path}: damaged adapter: .*{message}"):
        adapter.load(tmp_path)


def test_empty_adapter_is_an_error(tmp_path):
    """Unless its run, or one before it, cut units, which may have removed all updates."""
    empty = FULL._replace(deltas={}, supports={}, params={}, kept={})
    adapter.save(tmp_path, empty)
    with pytest.raises(InputError, match="holds no updates"):
        adapter.load(tmp_path)
    cut = empty._replace(config=FULL.config | {"kept": {"heads": [2]}})
    for name, saved in (("before", empty._replace(kept=FULL.kept)), ("now", cut)):
        (tmp_path / name).mkdir()
        adapter.save(tmp_path / name, saved)
        equal(adapter.load(tmp_path / name), saved)
    delta = DeltaConfig(start="elsewhere")
    assert adapted.described(delta, cut) is delta


@pytest.mark.parametrize(
    "shapes", [None, "[", "[]", '{"encoder": 3}', '{"b": [5, 4]}', '{"encoder/query/kernel": [-5, 4]}']
)
def test_masks_with_damaged_shapes_are_an_error(tmp_path, shapes):
    metadata = {"format": "dsee_jax.masks.1"} | ({} if shapes is None else {"shapes": shapes})
    save_file({"encoder/query/kernel": np.zeros(3, np.uint8)}, tmp_path / "masks.safetensors", metadata)
    with pytest.raises(InputError, match="masks.safetensors"):
        packed_masks.load(tmp_path / "masks.safetensors")


@pytest.mark.parametrize(
    ("arrays", "size"),
    [({"a": (4, 2), "b": (2, 5)}, r"\(4, 5\)"), ({"values": (1,)}, r"\(4, 3\) or larger")],
)
def test_adapter_of_another_base_names_both_sizes(tmp_path, arrays, size):
    supports = {"kernel": np.array([[3, 2]])} if "values" in arrays else {}
    deltas = {"kernel": {name: np.zeros(shape, np.float32) for name, shape in arrays.items()}}
    saved = adapter.Saved(deltas, supports, {}, {}, {}, {})
    with pytest.raises(InputError, match=rf"'kernel' is {size} and does not fit .*, which has \(3, 5\) there"):
        adapter.check(tmp_path / "adapter", tmp_path, {"kernel": np.zeros((3, 5), np.float32)}, saved)


def test_adapter_of_changed_weights_is_refused_on_others(tmp_path):
    """Pruning by SparseGPT changes the weights that stay; the model of the run has zeros where the masks have."""
    adapter.save(tmp_path, FULL._replace(params={}, kept={}, config=FULL.config | {adapter.MODEL_SHA256: "0" * 64}))
    kernel = np.ones((5, 4), np.float32)
    mask = FULL.masks["encoder"]["query"]["kernel"]
    own = {"encoder": {"query": {"kernel": np.where(mask, kernel, 0)}}}
    params, _ = adapted.attached(tmp_path, nn.Dense(4), own, "the model")
    np.testing.assert_array_equal(params["encoder"]["query"]["kernel"], own["encoder"]["query"]["kernel"])
    with pytest.raises(
        InputError, match="fits model/ of the run and no other: the model has weights at 'encoder/query"
    ):
        adapted.attached(tmp_path, nn.Dense(4), {"encoder": {"query": {"kernel": kernel}}}, "the model")
