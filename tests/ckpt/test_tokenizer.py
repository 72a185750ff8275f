"""Tokenizers of model folders: a vocabulary that is missing, incomplete or another model's is named."""

import contextlib
import json

import pytest

import tiny
from dsee_jax.ckpt import tokenizer
from dsee_jax.errors import InputError

FILES = {
    "bert": ("tokenizer_config.json", "special_tokens_map.json"),
    "roberta": (),
    "gpt2": ("tokenizer_config.json",),
    "llama": ("generation_config.json",),
}


@pytest.mark.parametrize("kind", FILES)
def test_folder_without_vocabulary_has_no_tokenizer(kind, tmp_path):
    """transformers makes one of the special tokens alone."""
    for name in ("config.json", *FILES[kind]):
        (tmp_path / name).write_text(
            json.dumps({"model_type": kind, "vocab_size": 100} if name == "config.json" else {})
        )
    with pytest.raises(InputError, match=r"no tokenizer in .*: it has no vocabulary; expected tokenizer.json"):
        tokenizer.load_tokenizer(tmp_path)


def test_file_of_sentencepiece_alone_is_described(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "vocab_size": 100}')
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(InputError, match=r"tokenizer.model alone needs .* write tokenizer.json") as caught:
        tokenizer.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_of_a_tokenizer_is_refused_without_a_question(tmp_path, monkeypatch):
    tiny.tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "own.py").write_text("raise SystemExit('run')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    with contextlib.suppress(InputError):
        tokenizer.load_tokenizer(tmp_path)


class Words:
    """A tokenizer of some size."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size


@pytest.mark.parametrize(
    ("count", "rows"),
    [
        *((30522, 30522), (32100, 32128), (128000, 128100), (50277, 50304), (50277, 50688), (151665, 151936)),
        *((151665, 152064), (50295, 51200), (50265, 50272), (28996, 28996), (259, 384), (97, 128), (512, 512)),
    ],
)
def test_padded_embedding_fits(count, rows):
    """T5, DeBERTa-v3, Pythia, Qwen2.5, Phi-2, OPT, byte and character models."""
    assert not tokenizer.misfit(Words(count), rows)


@pytest.mark.parametrize(
    ("count", "rows"), [(5, 30522), (200, 30522), (27000, 30522), (1, 50257), (32000, 128256), (5, 40)]
)
def test_incomplete_vocabulary_does_not_fit(count, rows):
    assert f"{count} tokens and the embedding {rows} rows" in tokenizer.misfit(Words(count), rows)


def test_cut_vocabulary_does_not_fit(minilm, tmp_path):
    words = (minilm / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join(words[:200]) + "\n")
    (tmp_path / "config.json").write_text((minilm / "config.json").read_text())
    assert tokenizer.misfit(tokenizer.load_tokenizer(tmp_path), 30522)
    assert not tokenizer.misfit(tokenizer.load_tokenizer(minilm), 30522)
