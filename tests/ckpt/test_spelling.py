"""Spellings of tensor names: prefixes are found from the names, and other modules are no other spelling."""

from types import SimpleNamespace

import pytest

from dsee_jax.ckpt import spelling


def model(prefix="", *, layers=2, stack="encoder.layer", norm="weight", width=4, head=(), wrap=""):
    """Return tensors of a small encoder, with shapes only."""
    names = {f"{prefix}embeddings.word.weight": (9, width), f"{prefix}embeddings.norm.{norm}": (width,)}
    for number in range(layers):
        names[f"{prefix}{stack}.{number}.{wrap}mlp.weight"] = (width, width)
        names[f"{prefix}{stack}.{number}.{wrap}norm.{norm}"] = (width,)
    names |= dict.fromkeys(head, (2, width))
    return {name: SimpleNamespace(shape=shape) for name, shape in names.items()}


@pytest.mark.parametrize("a", ["", "bert.", "model.language_model."])
@pytest.mark.parametrize("b", ["", "bert.", "model.language_model.", "model."])
def test_prefix_of_the_other_is_taken(a, b):
    """A head keeps its name; layers that the other lacks get the prefix too."""
    tensors = model(a, layers=3, head=["classifier.weight"])
    renamed = spelling.renamed(tensors, model(b, head=["score.weight"]))
    contained = {a, b} != {"bert.", "model."} and {a, b} != {"bert.", "model.language_model."}
    assert [*renamed.values()] == [*model(b if contained else a, layers=3, head=["classifier.weight"])]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"norm": "gamma"}, {}),
        ({}, {"norm": "gamma"}),
        ({"wrap": "_orig_mod."}, {}),
        ({"wrap": "_fsdp_wrapped_module."}, {"prefix": "bert."}),
        ({"prefix": "module."}, {}),
        ({"prefix": "module.bert.", "norm": "gamma"}, {}),
        ({"norm": "weight_g"}, {"norm": "parametrizations.weight.original0"}),
    ],
)
def test_wrappers_and_old_params_are_spellings(ours, theirs):
    assert [*spelling.renamed(model(**ours), model(**theirs)).values()] == [*model(**theirs)]


def test_param_outside_all_modules_gets_the_prefix():
    tensors, like = ({f"{prefix}mask_embed": SimpleNamespace(shape=(4,))} | model(prefix) for prefix in ("", "wave."))
    assert spelling.renamed(tensors, like)["mask_embed"] == "wave.mask_embed"


def test_other_modules_are_no_spelling():
    """An encoder and a decoder, or two towers that fit equally well, are not the same tensors."""
    encoder, decoder = model(stack="encoder.layer"), model(stack="decoder.layer")
    assert spelling.renamed(encoder, decoder) == {name: name for name in encoder}
    towers = model("text.") | model("vision.")
    assert spelling.renamed(model(), towers) == {name: name for name in model()}
    assert spelling.renamed(towers, model()) == {name: name for name in towers}
    wide = model("text.") | model("vision.", width=6)
    assert [*spelling.renamed(model(), wide).values()] == [*model("text.")]


def test_two_tensors_of_one_spelling_keep_their_names():
    both = model() | model(norm="gamma")
    assert spelling.renamed(both, model()) == {name: name for name in both}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("bert.embeddings.position_ids", (1, 512), True),
        ("h.0.attn.bias", (1, 1, 8, 8), True),
        ("h.0.attn.masked_bias", (), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 8, 8), True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("h.0.attn.bias", (8,), False),
        ("h.0.attn.c_attn.bias", (8,), False),
        ("embeddings.position_embeddings.weight", (8, 4), False),
    ],
)
def test_buffer_is_told_from_a_weight(name, shape, expected):
    assert spelling.is_buffer(name, shape) is expected


def test_layer_norm_of_old_checkpoints_and_wrappers_get_todays_names():
    """Another module may have a gamma of its own."""
    assert spelling.unwrapped("module.bert.a.LayerNorm.gamma") == "bert.a.LayerNorm.weight"
    assert spelling.unwrapped("layers.0._orig_mod.a.LayerNorm.beta") == "layers.0.a.LayerNorm.bias"
    assert spelling.unwrapped("stages.0.gamma") == "stages.0.gamma"
