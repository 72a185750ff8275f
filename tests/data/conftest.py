"""Fixtures of the tests of readers."""

import json

import pytest

import tiny
from dsee_jax.ckpt.tokenizer import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The tokenizer of tiny BERTs."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "config.json").write_text(json.dumps(tiny.config()))
    tiny.tokenizer(folder)
    return load_tokenizer(folder)
