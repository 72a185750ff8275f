"""Opening models: references, damaged folders, and fuzzed headers."""

import json
import os
import resource

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import gguf_files
import tiny
from dsee_jax.ckpt import tensors
from dsee_jax.errors import InputError
from merge.inputs import sources

CONFIG = {"model_type": "other", "vocab_size": 3}


def folder(path, arrays=None, config=CONFIG):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(arrays or {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, path / "model.safetensors")
    return path


def test_source_has_config_tensors_and_files(tmp_path):
    """Files are listed under names without this machine's folders."""
    tiny.bert(tmp_path / "a", shards=2)
    source = sources.open_source("a", tmp_path)
    stored = tensors.index(tmp_path / "a")
    assert source.folder == tmp_path / "a"
    assert source.config["model_type"] == "bert"
    assert source.tensors.keys() == stored.keys()
    for name, lazy in source.tensors.items():
        np.testing.assert_array_equal(
            lazy.read(0, stored[name].nbytes // 4), tensors.read(stored[name]).ravel(), strict=True
        )
    shards = [f"a/model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert list(source.files) == ["a/config.json", *shards]
    assert all(path.is_file() for path in source.files.values())


def test_path_is_looked_up_beside_the_recipe_first(tmp_path, monkeypatch):
    beside, here = folder(tmp_path / "recipes" / "a").parent, folder(tmp_path / "work" / "a").parent
    folder(here / "b")
    monkeypatch.chdir(here)
    assert sources.open_source("a", beside).folder == beside / "a"
    assert sources.open_source("b", beside).folder.resolve() == here / "b"
    assert sources.open_source(str(here / "a"), beside).folder == here / "a"


def test_folder_name_may_hold_plus_and_at(tmp_path):
    assert sources.open_source("a+b@c", folder(tmp_path / "a+b@c").parent).folder.name == "a+b@c"


def test_names_lose_their_wrappers(tmp_path):
    arrays = {f"module.x.{number}._orig_mod.LayerNorm.gamma": np.ones(2, np.float32) for number in range(2)}
    assert [*sources.open_source("a", folder(tmp_path / "a", arrays).parent).tensors] == [
        f"x.{number}.LayerNorm.weight" for number in range(2)
    ]


@pytest.mark.parametrize("differs", [True, False])
def test_stored_head_that_differs_from_its_tied_embedding_unties(tmp_path, caplog, differs):
    """Otherwise a trained head is lost where the result stores the embedding alone."""
    embedding = np.ones((3, 2), np.float32)
    arrays = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + differs}
    folder(tmp_path / "a", arrays, CONFIG | {"tie_word_embeddings": True})
    assert sources.open_source("a", tmp_path).config["tie_word_embeddings"] is not differs
    assert ("it is read as untied" in caplog.text) == differs


def test_revision_is_passed_to_the_hub(tmp_path, monkeypatch):
    requests = []

    def snapshot(name, *, revision, **options):
        requests.append((name, revision))
        return folder(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert sources.open_source("org/name@v1.0", tmp_path).folder == tmp_path / "snapshot"
    sources.open_source("org/name", tmp_path)
    assert requests == [("org/name", "v1.0"), ("org/name", None)]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("a@main", "has no revisions: leave out @main"),
        ("a+b+c", "cannot read the model 'a\\+b\\+c'"),
        ("a@b@c", "cannot read the model"),
        ("+a", "cannot read the model ''|cannot read the model '\\+a'"),
        ("", "cannot read the model ''"),
        ("./nowhere", r"does not exist .*looked beside the recipe too"),
        ("a+nowhere/at/all", "nowhere/at/all does not exist"),
        ("x" * 5000, "cannot be opened|no folder here|does not exist"),
        ("a\0b", "cannot be opened|does not exist"),
        ("~nobody-of-this-name/x", "cannot be opened|does not exist"),
        ("package:", "is no name of a package"),
        ("package:no_such_package_here", "not installed"),
    ],
)
def test_bad_reference_is_one_line(tmp_path, reference, message):
    folder(tmp_path / "a")
    with pytest.raises(InputError, match=message) as error:
        sources.open_source(reference, tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_folders_are_refused(tmp_path):
    """The error names the problem and the fix."""
    damaged = folder(tmp_path / "a")
    (damaged / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json is missing"):
        sources.open_source("a", tmp_path)
    (damaged / "config.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"config.json is not JSON"):
        sources.open_source("a", tmp_path)
    folder(damaged, {"x": np.ones(2, np.uint32)})
    with pytest.raises(InputError, match="'x' is stored as U32.*convert the model first"):
        sources.open_source("a", tmp_path)
    (damaged / "model.safetensors").unlink()
    (damaged / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match="is a pickle.*safetensors"):
        sources.open_source("a", tmp_path)


def test_named_pipe_is_refused(tmp_path):
    damaged = folder(tmp_path / "a")
    (damaged / "model.safetensors").unlink()
    os.mkfifo(damaged / "model.safetensors")
    with pytest.raises(InputError, match="not a file"):
        sources.open_source("a", tmp_path)


def safetensors(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        json.dumps({"a": ENTRY | {"data_offsets": [-8, 0]}}).encode(),
        json.dumps({"a": ENTRY | {"data_offsets": [8, 0]}}).encode(),
        json.dumps({"a": ENTRY, "b": ENTRY}).encode(),
        json.dumps({"a": ENTRY | {"shape": [2**63, 2]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": [2**62, 4], "data_offsets": [0, 2**64]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": [2.0]}}).encode(),
        json.dumps({"a": ENTRY | {"shape": "2"}}).encode(),
        json.dumps({"a": ENTRY | {"dtype": "F31"}}).encode(),
        json.dumps({"a": ENTRY | {"dtype": 4}}).encode(),
        json.dumps({"a": {"dtype": "F32"}}).encode(),
        json.dumps({"a": None}).encode(),
        json.dumps([ENTRY]).encode(),
        b'{1: {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a\xff": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        json.dumps({"a": ENTRY}).encode("utf-16"),
        json.dumps({"a\nb": ENTRY | {"shape": [3]}}).encode(),
        b"",
        b"null",
    ],
)
def test_bad_header_is_one_line(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(header, bytes(8)))
    with pytest.raises(InputError, match=r"model.safetensors is not a complete safetensors file") as error:
        tensors.index(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 9, 2**31, 2**62, 2**64 - 1])
def test_header_with_a_wrong_size_allocates_nothing(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(safetensors(json.dumps({"a": ENTRY}).encode(), bytes(8), size))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="not a complete safetensors file"):
        tensors.index(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "", ".", "x.bin", 5, None, ["x"], "x" * 300]
)
def test_index_with_a_bad_file_name_is_refused(tmp_path, file):
    (tmp_path / tensors.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(InputError, match="is not an index of shards"):
        tensors.index(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "5", '{"weight_map": []}', '{"weight_map": {}}', "\x00", "é"])
def test_malformed_index_is_refused(tmp_path, text):
    (tmp_path / tensors.INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is not an index of shards"):
        tensors.index(tmp_path)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["F32", "BF16", "I8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "U64", "F8_E4M3", "BOOL"]) | values,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | values,
        "data_offsets": st.lists(st.integers(-1, 40) | st.integers(), max_size=3) | values,
        "more": values,
    },
)
headers = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries | values, max_size=3)


def fuzz(examples):
    """A test over ``examples`` files: each is refused in one line, or its tensors lie inside the file."""

    @settings(deadline=None, max_examples=examples)
    @given(
        headers,
        st.binary(max_size=40),
        st.none() | st.integers(0, 2**64 - 1),
        st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=3),
    )
    def test(tmp_path_factory, header, data, size, flips):
        damaged = tmp_path_factory.getbasetemp() / "fuzzed"
        damaged.mkdir(exist_ok=True)
        content = bytearray(safetensors(json.dumps(header).encode(), data, size))
        for place, value in flips:
            content[place % len(content)] = value
        (damaged / "model.safetensors").write_bytes(content)
        try:
            index = tensors.index(damaged)
        except InputError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017
            return
        for stored in index.values():
            assert 0 <= stored.offset <= stored.offset + stored.nbytes <= len(content)
            assert all(isinstance(size, int) and size >= 0 for size in stored.shape)

    return test


test_any_file_is_read_or_refused = fuzz(300)
test_any_of_10000_files_is_read_or_refused = pytest.mark.exhaustive(fuzz(10_000))


def test_gguf_file_beside_the_recipe_is_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("DSEE_JAX_CACHE", str(tmp_path / "cache"))
    gguf_files.write(tmp_path / "m.gguf")
    source = sources.open_source("m.gguf", tmp_path)
    assert source.config["model_type"] == "llama"
    assert "model.layers.1.self_attn.q_proj.weight" in source.tensors
    assert source.files.keys() == {"m.gguf/config.json", "m.gguf/model.safetensors"}
    with pytest.raises(InputError, match=r"has no revisions: leave out @main"):
        sources.open_source("m.gguf@main", tmp_path)
