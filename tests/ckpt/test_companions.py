"""The files beside the weights: each kind is found, code only where a config names it, and no link leaves the folder."""

import json

import pytest

from dsee_jax.ckpt import companions


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_every_kind_of_tokenizer_is_copied(tmp_path):
    names = {
        "spm.model",
        "vocab.bpe",
        "bpe.codes",
        "dict.txt",
        "qwen.tiktoken",
        "additional_chat_templates/tools.jinja",
    }
    folder = write(tmp_path / "model", **dict.fromkeys([*names, "pytorch_model.bin", "notes.jinja"], "x"))
    assert {*companions.tokenizer_files(folder)} == names
    assert all(map(companions.of_tokenizer, names))
    (tmp_path / "out").mkdir()
    companions.copy(folder, tmp_path / "out", names)
    assert (tmp_path / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "x"


def test_processors_and_modules_are_copied(tmp_path, caplog):
    """A module may have weights; a pickle is not copied. A path that leaves the folder is no module."""
    modules = [
        {"path": ""},
        {"path": "."},
        {"path": "./"},
        {"path": "1_Pooling"},
        {"path": "2_Dense"},
        {"path": "../other"},
        {"path": "/etc"},
        {},
        3,
    ]
    names = {
        "generation_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "sentence_bert_config.json",
    }
    names |= {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    files = dict.fromkeys([*names, "2_Dense/pytorch_model.bin", "3_Other/config.json"], "{}")
    write(tmp_path / "other", **{"config.json": "{}"})
    folder = write(tmp_path / "model", **files, **{"modules.json": json.dumps(modules)})
    assert {*companions.others(folder)} == names | {"modules.json"}
    assert "2_Dense/pytorch_model.bin is not copied" in caplog.text
    write(folder, **{"modules.json": "["})
    assert "1_Pooling/config.json" not in companions.others(folder)
    assert "modules.json is not JSON" in caplog.text


@pytest.mark.parametrize(
    ("auto_map", "copied"),
    [
        ({"AutoModel": "modeling_x.Model"}, True),
        ({"AutoTokenizer": [None, "tokenization_x.Tokenizer"]}, True),
        ({"AutoModel": "org/name--modeling_x.Model"}, False),
        (None, False),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_is_copied_where_a_config_names_it(tmp_path, auto_map, copied, file):
    folder = write(
        tmp_path / "model", **{file: json.dumps({"auto_map": auto_map}), "modeling_x.py": "1 / 0", "part.py": ""}
    )
    assert companions.others(folder) == ["modeling_x.py", "part.py"] * copied


def test_link_out_of_the_folder_is_not_copied(tmp_path, caplog):
    """Links inside the folder, and those of the hub's cache to its blobs, are."""
    secret = write(tmp_path / "home", secret="s")
    blobs = write(tmp_path / "hub" / "models--x" / "blobs", abc="{}")
    folder = tmp_path / "hub" / "models--x" / "snapshots" / "main"
    write(folder, **{"real.txt": "x", "modules.json": json.dumps([{"path": "1_Pooling"}])})
    (folder / "vocab.txt").symlink_to(secret / "secret")
    (folder / "1_Pooling").symlink_to(secret)
    write(secret, **{"config.json": "{}"})
    (folder / "tokenizer.json").symlink_to("../../blobs/abc")
    (folder / "merges.txt").symlink_to("real.txt")
    assert companions.tokenizer_files(folder) == ["tokenizer.json", "merges.txt"]
    assert companions.others(folder) == ["modules.json"]
    assert blobs.is_dir()
    assert "vocab.txt is a link to" in caplog.text
