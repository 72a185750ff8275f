"""Configuration, tokenizer files and digests of a merged model."""

import hashlib
import json
import threading

import pytest

import tiny
from dsee_jax.errors import InputError
from merge.inputs.sources import Source
from merge.outputs import metadata


def test_hashes_are_sha256_and_progress_counts_every_byte(tmp_path):
    """Empty files and files larger than a buffer; a file named twice is read once."""
    contents = {"a": b"", "b": b"abc", "c": bytes(range(256)) * 10_000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    sizes, lock = [], threading.Lock()

    def progress(nbytes):
        with lock:
            sizes.append(nbytes)

    files = [tmp_path / name for name in contents]
    digests = metadata.hashes([*files, files[2]], progress)
    assert digests == {tmp_path / name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert sum(sizes) == 3 + 2_560_000


def test_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="gone cannot be read"):
        metadata.hashes([tmp_path / "gone"])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"torch_dtype": "float32", "x": 1}, {"torch_dtype": "bfloat16", "x": 1}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
    ],
)
def test_config_has_the_written_type(fields, expected):
    assert metadata.config(fields, dtype="BF16") == expected
    assert metadata.config(fields) == fields


def test_config_has_the_written_layers_and_rows():
    """Lists with one entry per layer follow the layers; other lists of the same length do not."""
    fields = {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "none"], "sizes": [1, 2, 3], "vocab_size": 7}
    merged = metadata.config(fields, layers=[0, 1, 1, 2], vocab_size=9)
    types = ["full", "sliding", "sliding", "none"]
    assert merged == fields | {"num_hidden_layers": 4, "layer_types": types, "vocab_size": 9}
    assert fields["num_hidden_layers"] == 3
    assert metadata.config({"n_layer": 2}, layers=[0]) == {"n_layer": 1}


def test_config_of_a_multimodal_model():
    fields = {"text_config": {"num_hidden_layers": 2, "vocab_size": 7, "x": 1}, "y": 2}
    merged = metadata.config(fields, layers=[1, 0, 1], vocab_size=8)
    assert merged == {"text_config": {"num_hidden_layers": 3, "vocab_size": 8, "x": 1}, "y": 2}
    assert fields["text_config"]["vocab_size"] == 7


def test_config_without_the_changed_field_is_refused():
    with pytest.raises(InputError, match=r"nothing of its layers: expected one of num_hidden_layers"):
        metadata.config({}, layers=[0])
    with pytest.raises(InputError, match=r"nothing of its rows of the embedding: expected vocab_size"):
        metadata.config({}, vocab_size=5)


def test_auto_takes_the_most_frequent_chat_template(tmp_path):
    """From its own file, or from a field of tokenizer_config.json: one text, or several by name."""
    for name in "abcd":
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ one }}")
    (tmp_path / "b" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ two }}\n"}))
    several = [{"name": "tools", "template": "{{ one }}"}, {"name": "default", "template": "{{ two }}"}]
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    folders = [tmp_path / name for name in "abcd"]
    assert metadata.chat_template("auto", folders) == "{{ two }}"
    assert metadata.chat_template("auto", folders[3:]) is None
    assert metadata.chat_template("{{ mine }}", folders) == "{{ mine }}"


def opened(folder, **fields):
    """An opened model in ``folder``, which has files beside its weights only."""
    return Source(folder.name, folder, {}, {}, {}, {}, **fields)


def files_in(folder, **contents):
    """Write texts into files by their paths, in which ``__`` is a slash; return the opened model."""
    for path, text in contents.items():
        file = folder / path.replace("__", "/").replace("_json", ".json").replace("_py", ".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return opened(folder)


def test_companions_are_copied_byte_by_byte(tmp_path):
    """With the generation config, and no other file of the donor."""
    donor, out = tiny.bert(tmp_path / "donor"), tmp_path / "out"
    (donor / "generation_config.json").write_text("{}")
    (donor / "training_args.bin").write_bytes(b"x")
    out.mkdir()
    copied, warnings = metadata.copied([opened(donor)])
    metadata.write(out, copied, {"b": 1, "a": "é"}, card="the card", recipe="the: recipe\n")
    names = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    written = ["README.md", "config.json", "merge_recipe.yml"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names + written)
    for name in names:
        assert (out / name).read_bytes() == (donor / name).read_bytes()
    assert (out / "config.json").read_text(encoding="utf-8") == '{\n  "a": "é",\n  "b": 1\n}\n'
    assert (out / "README.md").read_text() == "the card"
    assert (out / "merge_recipe.yml").read_text() == "the: recipe\n"
    assert warnings == []


def test_modules_of_a_sentence_encoder_are_copied_from_the_first_that_has_them(tmp_path):
    """Files that differ are the first model's, which is said."""
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}])
    base = files_in(tmp_path / "base", preprocessor_config_json="{}")
    one, two = (
        files_in(
            tmp_path / name, modules_json=modules, **{"1_Pooling__config_json": name, "preprocessor_config_json": "{ }"}
        )
        for name in ("one", "two")
    )
    files, warnings = metadata.copied([base, one, two])
    assert files["1_Pooling/config.json"] == one.folder / "1_Pooling" / "config.json"
    assert files["preprocessor_config.json"] == base.folder / "preprocessor_config.json"
    assert warnings == [
        "base is no sentence encoder: the modules of one are copied",
        "one has other files preprocessor_config.json; those of base are copied",
        "two has other files preprocessor_config.json, 1_Pooling/config.json; those of one are copied",
    ]
    (tmp_path / "out").mkdir()
    metadata.write(tmp_path / "out", files, {}, card="", recipe="")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == "one"


def test_adapters_tokenizer_replaces_the_models(tmp_path):
    base, adapter = tiny.bert(tmp_path / "base"), tiny.bert(tmp_path / "adapter")
    files, _ = metadata.copied([opened(base, adapter=adapter, own_tokenizer=True)])
    assert files["tokenizer.json"] == adapter / "tokenizer.json"
    files, _ = metadata.copied([opened(base, adapter=adapter)])
    assert files["tokenizer.json"] == base / "tokenizer.json"


def test_write_prefers_the_merged_tokenizer_and_template(tmp_path):
    from transformers import AutoTokenizer

    donor, out = tiny.bert(tmp_path / "donor"), tmp_path / "out"
    settings = json.loads((donor / "tokenizer_config.json").read_text()) | {"chat_template": "{{ old }}"}
    (donor / "tokenizer_config.json").write_text(json.dumps(settings))
    merged = AutoTokenizer.from_pretrained(donor)
    merged.add_tokens("<new>")
    out.mkdir()
    copied, _ = metadata.copied([opened(donor)])
    metadata.write(out, copied, {}, tokenizer=merged, template="{{ new }}", card="", recipe="")
    again = AutoTokenizer.from_pretrained(out)
    assert again.get_vocab() == merged.get_vocab()
    assert again.chat_template == "{{ new }}"
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
