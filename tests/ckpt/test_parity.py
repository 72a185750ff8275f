"""Encoders against Hugging Face transformers on torch: equal outputs, and folders that both libraries read."""

import logging

import jax
import numpy as np
import pytest

import tiny
from dsee_jax.ckpt import hf, hf_save

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "features": "AutoModel",
}


def _hf_outputs(folder, batch, kind="AutoModelForSequenceClassification"):
    torch = pytest.importorskip("torch")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**{name: torch.from_numpy(x).long() for name, x in batch.items()})
    if "QuestionAnswering" in kind:
        return np.stack([outputs.start_logits.numpy(), outputs.end_logits.numpy()], axis=-1)
    return outputs[0].numpy()


def _outputs(folder, batch, task="sequence-classification", **options):
    model, params = hf.load_pretrained(folder, task, **options)
    return np.asarray(jax.jit(model.apply)({"params": params}, **batch)), model, params


def _close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_logits(tmp_path, activation, types, padded):
    """Random tiny configs: every activation, one and two token types, padded and full rows."""
    folder = tiny.bert(tmp_path / "a", hidden_act=activation, type_vocab_size=types, seed=types)
    batch = tiny.batch(padded=padded, types=types)
    _close(_outputs(folder, batch)[0], _hf_outputs(folder, batch))


VARIANTS = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"type_vocab_size": 1, "pad_token_id": 1}),
    "roberta of two types": ("Roberta", {"type_vocab_size": 2, "pad_token_id": 0, "classifier_dropout": 0.2}),
    "xlm-roberta": ("XLMRoberta", {"type_vocab_size": 1, "pad_token_id": 1}),
    "deberta": ("Deberta", {"relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}),
    "deberta of near distances": (
        "Deberta",
        {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 5, "type_vocab_size": 2},
    ),
    "deberta c2p": ("Deberta", {"relative_attention": True, "pos_att_type": ["c2p"], "max_relative_positions": 32}),
    "deberta p2c": ("Deberta", {"relative_attention": True, "pos_att_type": "p2c", "pooler_hidden_act": "relu"}),
    "deberta of absolute positions": ("Deberta", {"relative_attention": False}),
    "mpnet": ("MPNet", {"type_vocab_size": 0, "pad_token_id": 1, "layer_norm_eps": 1e-5}),
    # The model still reads 32 rows, and takes 1 for the padding.
    "mpnet of other fields": (
        "MPNet",
        {"type_vocab_size": 0, "pad_token_id": 0, "relative_attention_num_buckets": 40, "hidden_act": "relu"},
    ),
    "mpnet of long texts": ("MPNet", {"type_vocab_size": 0, "pad_token_id": 1, "max_position_embeddings": 202}),
}


def _made(folder, variant, task):
    """Write a random model by transformers and return its config."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    family, more = VARIANTS[variant]
    own = ("model_type", "architectures", "initializer_range", "type_vocab_size", "pad_token_id")
    fields = {name: value for name, value in tiny.config().items() if name not in own} | {"initializer_range": 0.3}
    config = getattr(transformers, f"{family}Config")(**(fields | more))
    suffix = CLASSES[task].removeprefix("AutoModel") or "Model"
    model = getattr(transformers, f"{family}{suffix}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # Initial biases of 0 and norms of 1 would hide errors.
            weight += 0.2 * torch.randn_like(weight) if weight.ndim == 1 else 0
    model.save_pretrained(folder)
    return config


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("variant", "task"),
    [(name, task) for name in VARIANTS for task in CLASSES if " " not in name or task == "sequence-classification"],
)
def test_outputs_of_every_family_and_head(tmp_path, variant, task):
    """Equal outputs, padded and full rows; the folder that we write has the same bits, and transformers opens it."""
    from safetensors.numpy import load_file

    config = _made(tmp_path / "a", variant, task)
    options = {"types": config.type_vocab_size, "pad": config.pad_token_id}
    # The buckets of distances end at 128.
    length = 200 if config.max_position_embeddings > 200 else 20
    for batch in (tiny.batch(**options), tiny.batch(**options, padded=False, length=length)):
        actual, model, params = _outputs(tmp_path / "a", batch, task)
        _close(actual, _hf_outputs(tmp_path / "a", batch, CLASSES[task]))
    for size in ("5GB", "10KB"):
        folder = tmp_path / size
        hf_save.save_pretrained(folder, model, params, source=tmp_path / "a", max_shard_size=size)
        left = load_file(tmp_path / "a" / "model.safetensors")
        right = {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
        # A bare model of transformers has a pooler that no output here reads.
        assert left.keys() - right.keys() <= {"pooler.dense.weight", "pooler.dense.bias"}
        assert all(left[name].tobytes() == x.tobytes() for name, x in right.items())
    _close(actual, _hf_outputs(tmp_path / "10KB", batch, CLASSES[task]))


@pytest.mark.parametrize("variant", ["roberta", "deberta", "mpnet"])
def test_families_in_bfloat16(tmp_path, variant):
    """Within the 8 bits of bfloat16, over two layers."""
    config = _made(tmp_path / "a", variant, "features")
    batch = tiny.batch(types=config.type_vocab_size, pad=config.pad_token_id)
    seen = batch["attention_mask"] == 1
    actual, *_ = _outputs(tmp_path / "a", batch, "features", dtype="bfloat16")
    _close(actual[seen], _hf_outputs(tmp_path / "a", batch, "AutoModel")[seen], 5e-2)


@pytest.mark.parametrize("family", ["Roberta", "Deberta", "MPNet"])
def test_pretrained_encoders_are_read(tmp_path, family):
    """The pretraining head is ignored, and the task head is created."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    fields = tiny.config(family.lower())
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "architectures")}
    config = getattr(transformers, f"{family}Config")(**fields)
    getattr(transformers, f"{family}ForMaskedLM")(config).save_pretrained(tmp_path / "a")
    batch = tiny.batch(types=config.type_vocab_size)
    _close(_outputs(tmp_path / "a", batch, "features")[0], _hf_outputs(tmp_path / "a", batch, "AutoModel"))
    assert _outputs(tmp_path / "a", batch)[0].shape == (3, 2)


@pytest.mark.parametrize(
    "variant",
    [
        {"prefix": False},
        {"old_names": True},
        {"shards": 3},
        {"labels": 1},
        {"layer_norm_eps": 1e-5, "num_attention_heads": 1},
    ],
)
def test_logits_of_other_names(tmp_path, variant):
    """Names without the prefix, gamma and beta, shards, regression, another epsilon and one head."""
    folder, batch = tiny.bert(tmp_path / "a", **variant), tiny.batch()
    _close(_outputs(folder, batch, num_labels=variant.get("labels", 2))[0], _hf_outputs(folder, batch))


def test_bfloat16_is_close(tmp_path):
    """Within the 8 bits of bfloat16, over two layers."""
    folder, batch = tiny.bert(tmp_path / "a"), tiny.batch()
    _close(_outputs(folder, batch, dtype="bfloat16")[0], _hf_outputs(folder, batch), 5e-2)


def test_written_model_gives_equal_logits(tmp_path):
    """Changed params, written in shards, opened by transformers."""
    source, batch = tiny.bert(tmp_path / "a", labels=3), tiny.batch()
    _, model, params = _outputs(source, batch, num_labels=3)
    params = jax.tree.map(lambda leaf: 0.9 * leaf, params)
    hf_save.save_pretrained(tmp_path / "b", model, params, source=source, max_shard_size="10KB")
    actual = np.asarray(model.apply({"params": params}, **batch))
    _close(actual, _hf_outputs(tmp_path / "b", batch))


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForPreTraining", "BertModel"])
def test_transformers_folders_are_read(tmp_path, kind, size):
    """From save_pretrained of transformers, in one file and in shards: classifier, pretraining model, bare encoder."""
    torch = pytest.importorskip("torch")
    import transformers
    from safetensors.numpy import load_file

    torch.manual_seed(0)
    fields = {
        name: value
        for name, value in tiny.config().items()
        if name not in ("model_type", "architectures", "initializer_range")
    }
    model = getattr(transformers, kind)(transformers.BertConfig(**fields, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path / "a", max_shard_size=size)
    batch = tiny.batch()
    _close(_outputs(tmp_path / "a", batch, "features")[0], _hf_outputs(tmp_path / "a", batch, "AutoModel"))
    if kind == "BertForSequenceClassification":
        actual, read, params = _outputs(tmp_path / "a", batch)
        _close(actual, _hf_outputs(tmp_path / "a", batch))
        hf_save.save_pretrained(tmp_path / "b", read, params, source=tmp_path / "a", max_shard_size=size)
        left, right = (
            {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
            for folder in (tmp_path / "a", tmp_path / "b")
        )
        assert left.keys() == right.keys()
        assert all(left[name].tobytes() == right[name].tobytes() for name in left)


def test_real_minilm_features(minilm):
    """Released weights, sentences of several lengths: the last hidden state at all tokens."""
    pytest.importorskip("torch")
    from transformers import AutoTokenizer

    texts = ["A man is playing a guitar.", "No.", "The quick brown fox jumps over the lazy dog, twice in a row."]
    batch = dict(AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="np"))
    seen = batch["attention_mask"] == 1
    _close(_outputs(minilm, batch, "features")[0][seen], _hf_outputs(minilm, batch, "AutoModel")[seen])
