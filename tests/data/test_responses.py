"""Prompts and responses: where one ends, what is learnt, what is cut, and texts that several share a row."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import tiny
from dsee_jax.data.batches import Batches, assemble, bucket_edges, count, iterate
from dsee_jax.data.examples import Prompts
from dsee_jax.data.packing import pack
from dsee_jax.data.responses import encode, lay
from dsee_jax.data.tokens import ends, padding
from dsee_jax.errors import InputError

TEMPLATE = (
    "{% for m in messages %}{{ 'the' if m.role == 'user' else 'a' }} {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


def tokenizer(*, begin=False, template=None, prepend=False):
    """Whole words (with ``prepend`` each with the space before it, one put before the text); ``begin``: [CLS] in front."""
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
def test_the_response_has_an_end_and_the_prompt_what_the_tokenizer_puts_before_it(begin):
    found = encode(tokenizer(begin=begin), prompts(("the cat", " sees a dog")), ends=(3, 1), vocab_size=21)
    assert found == [([2] * begin + ids("the cat"), [*ids("sees a dog"), 3])]


def test_a_response_is_encoded_with_its_prompt_where_that_leaves_the_prompt_alone():
    """Alone, this tokenizer would put a second space before the response."""
    made = tokenizer(prepend=True)
    assert made(" a dog", add_special_tokens=False)["input_ids"] != ids("a dog")
    assert encode(made, prompts(("the cat", " a dog")), ends=(), vocab_size=21) == [(ids("the cat"), ids("a dog"))]
    # "bi" + "g" are one word together: the prompt would be another.
    apart = encode(made, prompts(("the bi", "g dog")), ends=(), vocab_size=21)
    assert apart == [([ids("the")[0], 1], [1, *ids("dog")])]


def test_a_chat_is_what_its_template_makes_of_it():
    """No second special tokens, no end of text behind one that the template has written."""
    pytest.importorskip("jinja2", reason="needs jinja2 (extra `text`)")
    chat = [
        {"role": "user", "content": "cat"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "is"},
    ]
    made = tokenizer(begin=True, template=TEMPLATE)
    (found,) = encode(made, prompts((chat, "red")), ends=(ids(".")[0],), vocab_size=21)
    assert found == (ids("the cat . a dog . the is . a"), ids("red ."))
    pair = ("the cat", " sees")
    mixed = encode(made, prompts(pair, (chat, "red"), pair), ends=(ids(".")[0],), vocab_size=21)
    assert mixed == [([2, *ids("the cat")], ids("sees .")), found, ([2, *ids("the cat")], ids("sees ."))]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "train.jsonl:1: messages need a chat template and the tokenizer has none"),
        (
            "{{ raise_exception('no such role') }}",
            "train.jsonl:1: the tokenizer's chat template does not take .*no such role",
        ),
        ("{{ messages|length }}", "train.jsonl:1: the chat template writes these messages otherwise"),
    ],
)
def test_chats_that_cannot_be_written_are_refused(template, message):
    pytest.importorskip("jinja2", reason="needs jinja2 (extra `text`)")
    chat = [{"role": "user", "content": "cat"}]
    with pytest.raises(InputError, match=message):
        encode(tokenizer(template=template), prompts((chat, "red")), ends=(), vocab_size=21)


def test_prompts_without_tokens_and_ids_without_a_row_are_refused():
    with pytest.raises(InputError, match=r"train\.jsonl:2: the prompt has no tokens"):
        encode(tokenizer(), prompts(("a", "a"), ("", "a")), ends=(), vocab_size=21)
    with pytest.raises(InputError, match="vocabulary larger than the embedding: the tokenizer gives id 20"):
        encode(tokenizer(), prompts(("a", ".")), ends=(), vocab_size=20)


def test_only_responses_are_learnt():
    """The label of a token is the next one; it counts from the prompt's last token to the response's last but one."""
    tokens = lay([([5, 6, 7], [8, 9]), ([5], [6, 7])], 8, pad_id=0, where=["a:1", "a:2"])
    batch = assemble(tokens, np.array([0, 1, -1]), np.array([6]))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0], [5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert batch["weights"].tolist() == [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    counted = batch["weights"] > 0
    assert batch["labels"][counted].tolist() == [8, 9, 6, 7]
    assert batch["weights"].dtype == np.float32
    assert batch["labels"].dtype == np.int32
    assert count(batch) == 8


def test_a_long_response_is_cut_and_named_and_a_long_prompt_refused(caplog):
    pairs = [([5, 6], [7, 8, 9]), ([5], [6]), ([5, 6, 7], [8, 9])]
    where = [f"train.csv:{line}" for line in (2, 3, 4)]
    tokens = lay(pairs, 4, pad_id=0, where=where)
    assert tokens.lengths.tolist() == [4, 2, 4]
    assert tokens.input_ids.tolist() == [5, 6, 7, 8, 5, 6, 5, 6, 7, 8]
    assert tokens.weights is not None
    assert tokens.weights.tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 1, 0]
    (record,) = caplog.records
    assert record.message == (
        "2 of 3 responses are cut at data.max_length = 4 tokens, prompt included: train.csv:2, train.csv:4"
    )
    with pytest.raises(
        InputError, match=r"train\.csv:4: the prompt has 3 tokens and leaves no room.*data\.max_length is 3"
    ):
        lay(pairs, 3, pad_id=0, where=where)


def random_texts(number, *, longest, seed=0):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, longest // 2, (number, 2))
    words = lambda size: generator.integers(5, 21, size).tolist()
    pairs = [(words(a), words(b)) for a, b in sizes]
    return lay(pairs, longest, pad_id=0, where=[""] * number), pairs


def test_packing_keeps_every_text_whole():
    """As a multiset, from the rows alone: segments are numbered 1, 2, 3 ..., and what is learnt goes with its text."""
    tokens, pairs = random_texts(57, longest=20)
    packed = pack(tokens, 24)
    found = []
    for row in range(packed.size):
        batch = assemble(packed, np.array([row]), np.array([24]))
        mask = batch["attention_mask"][0]
        assert 0 < (mask != 0).sum() <= 24
        assert np.unique(mask[mask != 0]).tolist() == list(range(1, mask.max() + 1))
        for number in range(1, mask.max() + 1):
            own = mask == number
            assert np.diff(np.flatnonzero(own)).tolist() == [1] * (own.sum() - 1)
            learnt = batch["labels"][0][own & (batch["weights"][0] > 0)].tolist()
            found.append((batch["input_ids"][0][own].tolist(), learnt))
    assert sorted(found) == sorted((prompt + response, response) for prompt, response in pairs)


def test_packing_fills_rows():
    """No two rows would fit into one, so all but one are more than half full; here next to nothing is left."""
    tokens, _ = random_texts(400, longest=24, seed=1)
    packed = pack(tokens, 64)
    assert np.sort(packed.lengths)[:2].sum() > 64
    assert packed.size <= np.ceil(tokens.lengths.sum() / 64) + 1
    assert pack(tokens, 64).input_ids.tolist() == packed.input_ids.tolist()


def test_packed_rows_go_on_in_the_middle_of_an_epoch():
    """Batches by step and a restored iterator, as of any other data."""
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


def test_ends_and_padding(tmp_path):
    made = tokenizer()
    assert ends(tmp_path, made) == (3,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert ends(tmp_path, made) == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert ends(tmp_path, made) == (7, 8)
    assert made.pad_token_id is None
    assert (padding(made, (7, 8)), padding(made, ())) == (7, 0)
