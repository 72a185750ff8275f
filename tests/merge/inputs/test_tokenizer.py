"""The merged vocabulary, and embeddings aligned to it. Expected rows are derived by hand."""

import json
import logging

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from dsee_jax.ckpt.tokenizer import load_tokenizer
from dsee_jax.errors import InputError
from merge import __main__ as command
from merge.inputs import roles, sources, tokenizer

FIRST = ["<unk>", "a", "b", "c"]
SECOND = ["<unk>", "c", "d", "a", "e"]


def model(folder, words, *, added=(), rows=None, seed=1, dtype=np.float32, kind="WordLevel", **fields):
    """Write a model whose embedding's row r is (seed, r), its head's row (seed, -r), and a tokenizer over ``words``."""
    folder.mkdir(parents=True)
    vocabulary = {word: row for row, word in enumerate(words)}
    saved = (
        models.WordLevel(vocabulary, unk_token="<unk>") if kind == "WordLevel" else models.BPE(vocabulary, [("a", "b")])
    )
    saved = Tokenizer(saved)
    saved.pre_tokenizer = pre_tokenizers.Whitespace()
    saved.add_special_tokens(["<unk>"])
    saved.add_tokens([AddedToken(token, normalized=False) for token in added])
    saved.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"} | fields
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = len(words) + len(added) if rows is None else rows
    (folder / "config.json").write_text(json.dumps({"vocab_size": size, "hidden_size": 2}))
    row = np.arange(size)
    arrays = {
        "model.embed_tokens.weight": np.stack([np.full(size, seed), row], 1).astype(dtype),
        "lm_head.weight": np.stack([np.full(size, seed), -row], 1).astype(dtype),
        "model.layers.0.mlp.weight": np.ones((size, 2), dtype),
    }
    save_file(arrays, folder / "model.safetensors")


def opened(folder, *names):
    return [sources.open_source(name, folder) for name in names]


def rows(source, name="model.embed_tokens.weight"):
    lazy = source.tensors[name]
    return lazy.read(0, int(np.prod(lazy.shape))).astype(np.float32).reshape(lazy.shape).tolist()


@pytest.fixture
def two(tmp_path):
    model(tmp_path / "one", FIRST, added=["<x>"], seed=1)
    model(tmp_path / "two", SECOND, added=["<y>"], seed=2)
    return tmp_path


def test_base_has_the_tokens_of_the_base(two):
    """A token that a model lacks gets the base's row."""
    opened_models = opened(two, "one", "two")
    vocabulary = tokenizer.build("base", opened_models, two, base="one")
    assert vocabulary.tokens == {"<unk>": 0, "a": 1, "b": 2, "c": 3, "<x>": 4}
    one, other = tokenizer.align(vocabulary, opened_models)
    assert rows(one) == [[1, 0], [1, 1], [1, 2], [1, 3], [1, 4]]
    assert rows(other) == [[2, 0], [2, 3], [1, 2], [2, 1], [1, 4]]
    assert rows(other, "lm_head.weight") == [[2, 0], [2, -3], [1, -2], [2, -1], [1, -4]]
    assert rows(other, "model.layers.0.mlp.weight") == [[1, 1]] * 6
    assert other.tensors["model.embed_tokens.weight"].dtype == "F32"


def test_union_appends_the_tokens_of_other_models(two):
    """After the base's tokens come the plain tokens of other models, then their added tokens."""
    opened_models = opened(two, "one", "two")
    vocabulary = tokenizer.build("union", opened_models, two, base="one")
    assert vocabulary.tokens == {"<unk>": 0, "a": 1, "b": 2, "c": 3, "<x>": 4, "d": 5, "e": 6, "<y>": 7}
    assert (vocabulary.token_rows, vocabulary.rows) == (8, 8)
    one, other = tokenizer.align(vocabulary, opened_models)
    assert rows(one) == [[1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [2, 2], [2, 4], [2, 5]]
    assert rows(other) == [[2, 0], [2, 3], [1, 2], [2, 1], [1, 4], [2, 2], [2, 4], [2, 5]]


def test_named_model_gives_the_tokens(two):
    """The model need not be merged; a token that no merged model has gets a zero row."""
    model(two / "elsewhere" / "three", ["<unk>", "e", "z", "b"], seed=3)
    opened_models = opened(two, "one", "two")
    vocabulary = tokenizer.build("elsewhere/three", opened_models, two, base="one")
    one, other = tokenizer.align(vocabulary, opened_models)
    assert rows(one) == [[1, 0], [2, 4], [0, 0], [1, 2]]
    assert rows(other) == [[2, 0], [2, 4], [0, 0], [1, 2]]


def test_missing_row_without_a_base_is_the_mean_of_other_models(two):
    model(two / "three", ["<unk>", "d"], seed=6)
    opened_models = opened(two, "one", "two", "three")
    vocabulary = tokenizer.build("union", opened_models, two)
    d = vocabulary.tokens["d"]
    one, other, third = tokenizer.align(vocabulary, opened_models)
    assert rows(one)[d] == [(2 + 6) / 2, (2 + 1) / 2]
    assert rows(other)[d] == [2, 2]
    assert rows(third)[d] == [6, 1]
    assert rows(third)[vocabulary.tokens["a"]] == [1.5, 2]
    with_base = tokenizer.align(vocabulary._replace(base="one"), opened_models)
    assert rows(with_base[2])[vocabulary.tokens["a"]] == [1, 1]
    assert rows(with_base[0])[d] == [4, 1.5]


def test_recipe_gives_rows_to_tokens(two):
    """Sources: a model, a token of a model, a row of a model, zeros; ``force`` also replaces existing rows."""
    opened_models = opened(two, "one", "two")
    tokens = {
        "<x>": {"source": "one"},
        "<y>": {"source": {"kind": "model_token", "model": "one", "token": "b"}},
        "a": {"source": {"kind": "model_token", "model": "two", "token_id": 5}, "force": True},
        "b": {"source": {"kind": "zero"}},
        "c": {"source": {"kind": "zero"}, "force": True},
        "new": {"source": {"kind": "model_token", "model": "two", "token": "a"}},
        "<unk>": {},
    }
    vocabulary = tokenizer.build("base", opened_models, two, base="one", tokens=tokens)
    assert vocabulary.tokens == {"<unk>": 0, "a": 1, "b": 2, "c": 3, "<x>": 4, "<y>": 5, "new": 6}
    one, other = tokenizer.align(vocabulary, opened_models)
    assert rows(one) == [[1, 0], [2, 5], [1, 2], [0, 0], [1, 4], [1, 2], [2, 3]]
    assert rows(other) == [[2, 0], [2, 5], [0, 0], [0, 0], [1, 4], [2, 5], [2, 3]]


def test_padding_is_the_mean_of_all_rows(two):
    opened_models = opened(two, "one", "two")
    vocabulary = tokenizer.build("base", opened_models, two, base="one", pad_to_multiple_of=4)
    assert (vocabulary.token_rows, vocabulary.rows) == (5, 8)
    assert rows(tokenizer.align(vocabulary, opened_models)[0])[4:] == [[1, 4], *[[1, 2]] * 3]
    assert tokenizer.build("base", opened_models, two, base="one", pad_to_multiple_of=5).rows == 5


def test_equal_vocabularies_keep_their_stored_type(tmp_path):
    model(tmp_path / "one", FIRST, dtype=np.float16)
    model(tmp_path / "two", FIRST, dtype=np.float16, seed=2)
    opened_models = opened(tmp_path, "one", "two")
    aligned = tokenizer.align(tokenizer.build("union", opened_models, tmp_path, base="one"), opened_models)
    assert [source.tensors["lm_head.weight"].dtype for source in aligned] == ["F16", "F16"]
    assert rows(aligned[1]) == rows(opened_models[1])


def test_rows_after_the_last_token_are_dropped(tmp_path):
    """The padding of an embedding is dropped; tokens after a model's last row count as missing."""
    model(tmp_path / "one", FIRST, rows=8)
    model(tmp_path / "two", SECOND, rows=3, seed=2)
    opened_models = opened(tmp_path, "one", "two")
    one, other = tokenizer.align(tokenizer.build("base", opened_models, tmp_path, base="one"), opened_models)
    assert rows(one) == [[1, 0], [1, 1], [1, 2], [1, 3]]
    assert rows(other) == [[2, 0], [1, 1], [1, 2], [2, 1]]


def test_base_tokens_without_a_row_are_dropped(tmp_path):
    """Added tokens of any tokenizer, and BPE tokens; the tokens of a word-level vocabulary cannot be dropped."""
    model(tmp_path / "added", FIRST, added=["<x>"], rows=4, pad_token="<x>")
    model(tmp_path / "pairs", ["<unk>", "a", "b", "c", "ab"], rows=4, kind="BPE")
    model(tmp_path / "words", FIRST, rows=3)
    for name in ("added", "pairs"):
        vocabulary = tokenizer.build("base", opened(tmp_path, name), tmp_path)
        assert vocabulary.tokens == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
        (tmp_path / f"{name}-out").mkdir()
        vocabulary.tokenizer.save_pretrained(tmp_path / f"{name}-out")
        again = load_tokenizer(tmp_path / f"{name}-out")
        assert again.get_vocab() == vocabulary.tokens
    with pytest.raises(InputError, match="1 tokens more than the model's 3 rows"):
        tokenizer.build("base", opened(tmp_path, "words"), tmp_path)


def test_model_without_a_tokenizer_takes_the_tokenizer_of_the_base(two, caplog):
    model(two / "three", FIRST, seed=3)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (two / "three" / file).unlink()
    opened_models = opened(two, "one", "three")
    with caplog.at_level(logging.WARNING):
        vocabulary = tokenizer.build("base", opened_models, two, base="one")
    assert "three has no tokenizer" in caplog.text
    assert rows(tokenizer.align(vocabulary, opened_models)[1]) == [[3, 0], [3, 1], [3, 2], [3, 3], [1, 4]]
    with pytest.raises(InputError, match="no tokenizer in .*three"):
        tokenizer.build("base", opened_models[::-1], two, base="three")


def test_saved_tokenizer_has_every_token(two):
    vocabulary = tokenizer.build("union", opened(two, "one", "two"), two, base="one")
    (two / "out").mkdir()
    vocabulary.tokenizer.save_pretrained(two / "out")
    again = load_tokenizer(two / "out")
    assert again.get_vocab() == vocabulary.tokens
    assert again("a d <y> q")["input_ids"] == [1, 5, 7, 0]


def test_command_merges_rows_by_token(tmp_path):
    """The embeddings have equal shapes, so a merge row by row would be possible."""
    model(tmp_path / "one", FIRST, added=["<x>"], seed=1)
    model(tmp_path / "two", SECOND, seed=2)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: linear\ntokenizer_source: union\nparameters: {weight: 1}\nmodels: [{model: one}, {model: two}]\n"
    )
    assert command.main([str(recipe), str(tmp_path / "out")]) == 0
    assert load_tokenizer(tmp_path / "out").get_vocab() == {
        token: row for row, token in enumerate(["<unk>", "a", "b", "c", "<x>", "d", "e"])
    }
    (opened_models,) = opened(tmp_path, "out")
    assert opened_models.config["vocab_size"] == 7
    assert rows(opened_models) == [[1.5, 0], [1.5, 2], [1, 2], [1.5, 2], [1, 4], [2, 2], [2, 4]]


def test_build_does_not_change_the_tokenizer_files(two):
    before = (two / "one" / "tokenizer.json").read_bytes()
    tokenizer.build("union", opened(two, "one", "two"), two, base="one")
    assert (two / "one" / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("three", "'three' is not a model of the recipe"),
        ("onee", "did you mean 'one'"),
        ("two", "'two' has no token 'b'"),
        ({"kind": "zeros"}, "expected a model, {kind: zero}"),
        ({"kind": "model_token", "model": "two"}, "expected a model"),
        ({"kind": "model_token", "model": "two", "token": "a", "token_id": 1}, "expected a model"),
        ({"kind": "model_token", "model": "two", "token_id": 6}, "rows 0 to 5"),
        ({"kind": "model_token", "model": "two", "token_id": -1}, "rows 0 to 5"),
        (None, "expected a model"),
        (5, "expected a model"),
    ],
)
def test_bad_token_source_is_refused(two, source, message):
    with pytest.raises(InputError, match=message) as error:
        tokenizer.build(
            "base", opened(two, "one", "two"), two, base="one", tokens={"b": {"source": source, "force": True}}
        )
    assert "tokenizer.tokens.b.source" in str(error.value)


def test_different_vocabularies_are_refused_or_warned_about(two, caplog):
    """Different sizes are an error; different tokens in one row, which mergekit accepts, a warning."""
    model(two / "three", ["<unk>", "b", "a", "c", "<x>"])
    with pytest.raises(InputError, match=r"'one' has vocab_size 5 and 'two' 6.*tokenizer_source: base"):
        tokenizer.check(opened(two, "one", "two"))
    with caplog.at_level(logging.WARNING):
        tokenizer.check(opened(two, "one", "one"))
        assert not caplog.text
        tokenizer.check(opened(two, "one", "three"))
    assert "2 rows stand for different tokens in three and one" in caplog.text
    assert "row 1 is 'b' and 'a'" in caplog.text


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (9, 2), True),
        ("transformer.wte.weight", (9, 2), True),
        ("embeddings.word_embeddings.weight", (9, 2), True),
        ("lm_head.weight", (9, 2), True),
        ("cls.predictions.decoder.bias", (9,), True),
        ("cls.predictions.bias", (9,), True),
        ("model.embed_tokens.weight", (8, 2), False),
        ("embeddings.position_embeddings.weight", (9, 2), False),
        ("decoder.layers.0.mlp.weight", (9, 2), False),
        ("model.norm.weight", (9,), False),
    ],
)
def test_vocabulary_tensor_is_found_by_name_and_rows(tmp_path, name, shape, expected):
    save_file({name: np.zeros(shape, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 9}}')
    source = sources.open_source(str(tmp_path), tmp_path)
    assert roles.vocab_size(source.config) == 9
    assert roles.is_vocabulary(name, source.tensors[name], 9) is expected


def test_vocabulary_tensors_of_different_widths_are_refused(two):
    wide = {"model.embed_tokens.weight": np.zeros((6, 3), np.float32)}
    save_file(wide, two / "two" / "model.safetensors")
    opened_models = opened(two, "one", "two")
    with pytest.raises(InputError, match=r"\(5, 2\) in 'one' and \(6, 3\) in 'two'"):
        tokenizer.align(tokenizer.build("base", opened_models, two, base="one"), opened_models)
