"""Folders that are no model: one line says what they are, and what to do."""

import json
import re
import shlex
import subprocess
import sys

import pytest

import tiny
from dsee_jax.ckpt import adapter, formats, hf, tensors
from dsee_jax.ckpt.resolve import resolve
from dsee_jax.errors import InputError

PEFT = {"adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"})}

FOLDERS = {
    "nothing": ((), r"config.json is missing: .* it is empty"),
    "other files": (("train.csv",), r"config.json is missing: .* it holds train.csv"),
    "no config": (("model.safetensors",), r"config.json is missing: .* it holds model.safetensors"),
    "no weights": (
        ("config.json", "optimizer.pt", "training_args.bin"),
        r"holds no weights: expected model.safetensors",
    ),
    "Flax": (("config.json", "flax_model.msgpack"), r"flax_model.msgpack is weights of Flax.*from_flax=True"),
    "TensorFlow": (("config.json", "tf_model.h5"), r"tf_model.h5 is weights of TensorFlow.*from_tf=True"),
    "TensorFlow 1": (("model.ckpt-9.index", "model.ckpt-9.meta"), r"model.ckpt-9.index is a checkpoint of TensorFlow"),
    "GGUF": (("config.json", "m.Q4.gguf"), r"m.Q4.gguf is not a GGUF file"),
    "several GGUF": (("config.json", "m.Q4.gguf", "m.Q8.gguf"), r"holds 2 GGUF files: give one of them"),
    "ONNX": (("config.json", "model.onnx"), r"model.onnx is an ONNX program"),
    "OpenVINO": (("config.json", "openvino_model.bin"), r"openvino_model.bin is an OpenVINO program"),
    "first layout": (("consolidated.00.pth", "params.json"), r"consolidated.00.pth is the original layout"),
    "a pickle and Flax": (("config.json", "flax_model.msgpack", "pytorch_model.bin"), r"pytorch_model.bin is a pickle"),
    "a pickle without config": (("pytorch_model.bin",), r"pytorch_model.bin is a pickle"),
    "pickled shards": (
        ("config.json", "optimizer.pt", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        r"glob\(\"pytorch_model-\*.bin\"\)",
    ),
    "shards without index": (
        ("config.json", "model-00001-of-00002.safetensors"),
        r"without model.safetensors.index.json",
    ),
    "an unfinished download": (
        ("config.json", "model.safetensors.part"),
        r"holds no weights: .*; it holds model.safetensors.part, config.json",
    ),
    "another case": (("config.json", "MODEL.SAFETENSORS"), r"must be named model.safetensors: rename"),
    "another name": (("config.json", "weights.safetensors"), r"must be named model.safetensors: rename"),
    "PEFT": ((*PEFT, "adapter_model.safetensors"), r"is a PEFT adapter of org/base and no model.*write org/base\+"),
    "pickled PEFT": (("adapter_model.bin",), r"is a PEFT adapter and no model.*write BASE\+"),
    "checkpoints": (("checkpoint-500/config.json",), r"holds folders of models: .*checkpoint-500"),
    "sentence-transformers": (
        ("modules.json", "0_Transformer/config.json"),
        r"give one of them, such as .*/0_Transformer",
    ),
    "a pickle of sentence-transformers": (
        ("config.json", "pytorch_model.bin", "1_Pooling/config.json"),
        r"is a pickle",
    ),
    "first sentence-transformers": (("modules.json", "config.json", "0_BERT/config.json"), r"such as .*/0_BERT"),
    "cache of the hub": (("refs/main", "snapshots/abc/config.json"), r"give one of them, such as .*/snapshots/abc"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folder_that_is_no_model_is_described(kind, tmp_path):
    names, message = FOLDERS[kind]
    folder = tmp_path / "given"
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        config = {"__version__": "0.2"} if kind.startswith("first sent") and name == "config.json" else tiny.config()
        (folder / name).write_text(PEFT.get(name, json.dumps(config) if name.endswith(".json") else ""))
    if (folder / "1_Pooling").exists():
        (folder / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=message) as caught:
        hf.load_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "message"), [("m.ggml", "GGML"), ("model.safetensors", "is a file")])
def test_file_is_no_folder(name, message, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"{name} .*{message}.*expected the folder that holds config.json"):
        resolve(str(tmp_path / name))


def test_peft_adapter_is_no_adapter_of_a_run(tmp_path):
    for name in (*PEFT, "adapter_model.safetensors"):
        (tmp_path / name).write_text(PEFT.get(name, ""))
    with pytest.raises(InputError, match=r"is a PEFT adapter of org/base .*expected the adapter/ folder of a run"):
        adapter.load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a pointer of Git LFS.*git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html>Not found</html>", "is a web page: the download failed"),
        (b"PK\x03\x04archive/data.pkl", "is an archive, or a pickle of PyTorch"),
        (b"\x80\x02}q\x00X\x01\x00\x00", "is a pickle under another name"),
    ],
)
def test_file_of_another_kind_is_named(name, content, message, tmp_path):
    folder = tiny.bert(tmp_path / "a")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"^\S*{re.escape(name)} {message}"):
        hf.load_pretrained(folder)


def test_header_of_any_length_is_read(tmp_path):
    """The first byte of the file, of the header's length, may be that of another format."""
    for length in (ord("<"), 0x80):
        header = json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode().ljust(length + 256)
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        assert tensors.index(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_link_to_nothing_is_named(name, tmp_path):
    folder = tiny.bert(tmp_path / "a")
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/abc")
    with pytest.raises(InputError, match=rf"{name} is a link to ../blobs/abc, where there is nothing.*cp -L"):
        hf.load_pretrained(folder)


def test_integers_are_no_weights(tmp_path):
    folder = tiny.bert(tmp_path / "a", num_hidden_layers=1)
    arrays = {name: tensors.read(stored) for name, stored in tensors.index(folder).items()}
    tensors.write(folder, {name: array.astype("int8") if array.ndim == 2 else array for name, array in arrays.items()})
    with pytest.raises(InputError, match=r"'bert\.\S+' is stored as I8; .*not quantised"):
        hf.load_pretrained(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "$(touch run).bin", "a';touch run;'.pt", 'b"`touch run`".bin', "[x]*.bin"]
)
def test_printed_command_runs_no_file_name(name, tmp_path):
    """The command reaches Python as one word, whose pattern is the name of the file."""
    _, command = formats.pickled([name]) or ("", "")
    words = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {command}"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    python, option, program = words.decode().split("\0")[:3]
    assert (python, option) == ("python", "-c")
    assert shlex.split(command) == [python, option, program]
    assert not any(tmp_path.iterdir())
    (tmp_path / name).touch()
    pattern = re.search(r"glob\.glob\((.*?)\)\) for", program)
    assert pattern
    found = f"import glob; print(glob.glob({pattern[1]}))"
    assert (
        subprocess.run([sys.executable, "-c", found], cwd=tmp_path, capture_output=True, text=True).stdout
        == f"{[name]}\n"
    )
