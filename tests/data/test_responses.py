"""Prompts and responses: boundaries, loss weights, truncation, and packing of several texts into a row."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import tiny
from dsee_jax.data.batches import Batches, assemble, bucket_edges, count_tokens, iterate
from dsee_jax.data.examples import Prompts
from dsee_jax.data.packing import pack
from dsee_jax.data.responses import encode, to_tokens
from dsee_jax.data.tokens import ends, pad_id
from dsee_jax.errors import InputError

TEMPLATE = (
    "{% for m in messages %}{{ 'the' if m.role == 'user' else 'a' }} {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def tokenizer(*, begin=False, template=None, prepend=False):
    """A tokenizer of whole words; ``prepend``: each with its leading space; ``begin``: [CLS] before the text."""
    from transformers import PreTrainedTokenizerFast

    words = [*tiny.VOCABULARY[:5], *(f"▁{word}" if prepend else word for word in tiny.WORDS)]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = (
        pre_tokenizers.Metaspace(prepend_scheme="never") if prepend else pre_tokenizers.WhitespaceSplit()
    )
    if prepend:
        made.normalizer = normalizers.Prepend("▁")
        made.decoder = decoders.Metaspace(prepend_scheme="always")
    if begin:
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]", chat_template=template)


def ids(text):
    return [5 + tiny.WORDS.index(word) for word in text.split()]


def prompts(*pairs):
    return Prompts([a for a, _ in pairs], [b for _, b in pairs], [f"train.jsonl:{n}" for n in range(1, len(pairs) + 1)])


@pytest.mark.parametrize("begin", [False, True])
def test_response_ends_and_prompt_has_special_tokens(begin):
    pairs = encode(tokenizer(begin=begin), prompts(("the cat", " sees a dog")), ends=(3, 1), vocab_size=21)
    assert pairs == [([2] * begin + ids("the cat"), [*ids("sees a dog"), 3])]


def test_response_is_encoded_together_with_its_prompt():
    """On its own, this tokenizer would add a second space before the response."""
    made = tokenizer(prepend=True)
    assert made(" a dog", add_special_tokens=False)["input_ids"] != ids("a dog")
    assert encode(made, prompts(("the cat", " a dog")), ends=(), vocab_size=21) == [(ids("the cat"), ids("a dog"))]
    # "bi" + "g" are one word: joint encoding would change the prompt.
    separate = encode(made, prompts(("the bi", "g dog")), ends=(), vocab_size=21)
    assert separate == [([ids("the")[0], 1], [1, *ids("dog")])]


def test_chat_is_formatted_by_its_template():
    """No second special tokens, and no second end of text after the one of the template."""
    pytest.importorskip("jinja2", reason="needs jinja2 (extra `text`)")
    chat = [
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "is"},
    ]
    made = tokenizer(begin=True, template=TEMPLATE)
    (pair_of_chat,) = encode(made, prompts((chat, "red")), ends=(ids(".")[0],), vocab_size=21)
    assert pair_of_chat == (ids("the cat . a dog . the is . a"), ids("red ."))
    pair = ("the cat", " sees")
    mixed = encode(made, prompts(pair, (chat, "red"), pair), ends=(ids(".")[0],), vocab_size=21)
    assert mixed == [([2, *ids("the cat")], ids("sees .")), pair_of_chat, ([2, *ids("the cat")], ids("sees ."))]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "train.jsonl:1: messages need a chat template and the tokenizer has none"),
        (
            "{{ raise_exception('no such role') }}",
            "train.jsonl:1: the tokenizer's chat template rejects .*no such role",
        ),
        ("{{ messages|length }}", "train.jsonl:1: the chat template formats these messages differently"),
    ],
)
def test_unformattable_chat_is_refused(template, message):
    pytest.importorskip("jinja2", reason="needs jinja2 (extra `text`)")
    chat = [{"role": "user", "content": "cat"}]
    with pytest.raises(InputError, match=message):
        encode(tokenizer(template=template), prompts((chat, "red")), ends=(), vocab_size=21)


def test_empty_prompt_and_id_beyond_the_embedding_are_refused():
    with pytest.raises(InputError, match=r"train\.jsonl:2: the prompt has no tokens"):
        encode(tokenizer(), prompts(("a", "a"), ("", "a")), ends=(), vocab_size=21)
    with pytest.raises(InputError, match="vocabulary larger than the embedding: the tokenizer gives id 20"):
        encode(tokenizer(), prompts(("a", ".")), ends=(), vocab_size=20)


def test_only_response_tokens_have_weight():
    """The label of a position is the next token; weights are 1 from the prompt's last token to the response's last but one."""
    tokens = to_tokens([([5, 6, 7], [8, 9]), ([5], [6, 7])], 8, pad_id=0, where=["a:1", "a:2"])
    batch = assemble(tokens, np.array([0, 1, -1]), np.array([6]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0], [5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch["weights"].tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    counted = batch["weights"] > 0
    assert batch["labels"][counted].tolist() == [8, 9, 6, 7]
    assert batch["weights"].dtype == np.float32
    assert batch["labels"].dtype == np.int32
    assert count_tokens(batch) == 8


def test_long_response_is_truncated_and_long_prompt_refused(caplog):
    pairs = [([5, 6], [7, 8, 9]), ([5], [6]), ([5, 6, 7], [8, 9])]
    where = [f"train.csv:{line}" for line in (2, 3, 4)]
    tokens = to_tokens(pairs, 4, pad_id=0, where=where)
    assert tokens.lengths.tolist() == [4, 2, 4]
    assert tokens.input_ids.tolist() == [5, 6, 7, 8, 5, 6, 5, 6, 7, 8]
    assert tokens.weights is not None
    assert tokens.weights.tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 1, 0]
    (record,) = caplog.records
    assert record.message == (
        "2 of 3 responses are truncated at data.max_length = 4 tokens, prompt included: train.csv:2, train.csv:4"
    )
    with pytest.raises(
        InputError, match=r"train\.csv:4: the prompt has 3 tokens and leaves no room.*data\.max_length is 3"
    ):
        to_tokens(pairs, 3, pad_id=0, where=where)


def random_texts(number, *, longest, seed=0):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, longest // 2, (number, 2))
    words = lambda size: generator.integers(5, 21, size).tolist()
    pairs = [(words(a), words(b)) for a, b in sizes]
    return to_tokens(pairs, longest, pad_id=0, where=[""] * number), pairs


def test_packing_keeps_every_text_complete():
    """The multiset of texts in the rows is that of the input; segments are 1, 2, 3 ..., and weights move with their text."""
    tokens, pairs = random_texts(57, longest=20)
    packed = pack(tokens, 24)
    texts = []
    for row in range(packed.size):
        batch = assemble(packed, np.array([row]), np.array([24]))
        mask = batch["attention_mask"][0]
        assert 0 < (mask != 0).sum() <= 24
        assert np.unique(mask[mask != 0]).tolist() == list(range(1, mask.max() + 1))
        for number in range(1, mask.max() + 1):
            own = mask == number
            assert np.diff(np.flatnonzero(own)).tolist() == [1] * (own.sum() - 1)
            learnt = batch["labels"][0][own & (batch["weights"][0] > 0)].tolist()
            texts.append((batch["input_ids"][0][own].tolist(), learnt))
    assert sorted(texts) == sorted((prompt + response, response) for prompt, response in pairs)


def test_packing_leaves_little_space():
    """No two rows fit into one, so all but one are more than half full."""
    tokens, _ = random_texts(400, longest=24, seed=1)
    packed = pack(tokens, 64)
    assert np.sort(packed.lengths)[:2].sum() > 64
    assert packed.size <= np.ceil(tokens.lengths.sum() / 64) + 1
    assert pack(tokens, 64).input_ids.tolist() == packed.input_ids.tolist()


def test_packed_iterator_resumes_in_the_middle_of_an_epoch():
    """Batches by step equal those of a restored iterator."""
    packed = pack(random_texts(60, longest=20)[0], 32)
    make = lambda: Batches(packed, 4, 2.0, 0, bucket_edges(packed.lengths))
    whole = [make()[step] for step in range(len(make()))]
    first = iterate(make())
    taken = len(whole) // 2 + 1
    for _ in range(taken):
        next(first)
    second = iterate(make())
    second.set_state(first.get_state())
    for batch, expected in zip(second, whole[taken:], strict=True):
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name], values)


def test_end_and_padding_ids_come_from_the_files(tmp_path):
    made = tokenizer()
    assert ends(tmp_path, made) == (3,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert ends(tmp_path, made) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert ends(tmp_path, made) == (7, 8)
    assert made.pad_token_id is None
    assert (pad_id(made, (7, 8)), pad_id(made, ())) == (7, 0)
