"""Adapters of PEFT at the paths of a model; live comparisons with PEFT on torch in the parity tier."""

import numpy as np
import pytest

import decoders
import dsee_jax
import loras
import tiny
from dsee_jax import tree
from dsee_jax.ckpt import adapted, hf, peft, peft_paths
from dsee_jax.errors import InputError

LAYER = "model.layers.{}.self_attn.{}_proj"
SHAPES = {LAYER.format(layer, name): (size, 24) for layer in range(2) for name, size in (("q", 24), ("v", 8))}
"""The modules that the adapters of these tests update, with the shapes of their weights (out, in)."""
LORA = loras.pairs(SHAPES)
Q, V = LAYER.format(0, "q"), LAYER.format(1, "v")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Llama and a GPT-2 that write text, and a BERT that classifies, by name."""
    folder = tmp_path_factory.mktemp("bases")
    kinds = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "sequence-classification"}
    for name in ("llama", "gpt2"):
        decoders.write(folder / name, **decoders.VARIANTS[name])
    tiny.bert(folder / "bert")
    return {name: hf.abstract_model(folder / name, task) for name, task in kinds.items()}


def dense(saved, path):
    """Return the dense update (in, out) of a kernel."""
    delta = tree.get(saved.deltas, path)
    return saved.config["scale"] * delta["a"] @ delta["b"]


@pytest.mark.parametrize(
    ("settings", "q", "v"),
    [
        ({}, 3, 3),
        ({"use_rslora": True}, 6 / np.sqrt(2), 6 / np.sqrt(2)),
        ({"alpha_pattern": {"layers.1.self_attn.v_proj": 1}, "target_modules": "model.*(q|v)_proj"}, 3, 0.5),
        ({"alpha_pattern": {"q_proj": 0, "v_proj": -4}}, 0, -2),
    ],
)
def test_module_with_its_own_scale_keeps_its_update(models, tmp_path, settings, q, v):
    """The adapter has the scale of most modules, above 0."""
    saved = peft_paths.to_saved(peft.read(loras.write(tmp_path, LORA, **settings)), models["llama"], "base")
    assert saved.config["scale"] == pytest.approx(abs(q or v))
    for module, path, scale in ((Q, "layer_0/attention/query", q), (V, "layer_1/attention/value", v)):
        expected = scale * (LORA[f"{module}.lora_B.weight"] @ LORA[f"{module}.lora_A.weight"]).T
        np.testing.assert_allclose(dense(saved, f"decoder/{path}/kernel"), expected, rtol=1e-5, atol=1e-6)


def test_modules_may_have_other_ranks(models, tmp_path):
    arrays = LORA | loras.pairs({V: (8, 24)}, rank=3)
    folder = loras.write(tmp_path, arrays, rank_pattern={V: 3}, alpha_pattern={V: 3})
    saved = peft_paths.to_saved(peft.read(folder), models["llama"], "base")
    expected = (arrays[f"{V}.lora_B.weight"] @ arrays[f"{V}.lora_A.weight"]).T
    path = "decoder/layer_1/attention/value/kernel"
    assert tree.get(saved.deltas, path)["a"].shape == (24, 3)
    np.testing.assert_allclose(dense(saved, path), expected, rtol=1e-5, atol=1e-6)


def test_update_of_a_joint_weight_is_split(models, tmp_path):
    """GPT-2 has one tensor (in, out) for query, key and value."""
    module = "transformer.h.0.attn.c_attn"
    arrays = loras.pairs({module: (72, 24)})
    saved = peft_paths.to_saved(peft.read(loras.write(tmp_path, arrays, fan_in_fan_out=True)), models["gpt2"], "base")
    parts = [dense(saved, f"decoder/layer_0/attention/{name}/kernel") for name in ("query", "key", "value")]
    expected = 3 * (arrays[f"{module}.lora_B.weight"] @ arrays[f"{module}.lora_A.weight"]).T
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=1e-5, atol=1e-6)


def test_layers_of_a_scanned_model_get_the_largest_rank(models, tmp_path):
    arrays = LORA | loras.pairs({V: (8, 24)}, rank=3)
    folder = loras.write(tmp_path, arrays)
    single, stacked = (adapted.read(folder, models["llama"].clone(scan=scan), "base") for scan in (False, True))
    delta = tree.get(stacked.deltas, "decoder/layers/attention/value/kernel")
    assert delta["a"].shape == (2, 24, 3)
    for layer in range(2):
        expected = dense(single, f"decoder/layer_{layer}/attention/value/kernel")
        np.testing.assert_allclose(3 * delta["a"][layer] @ delta["b"][layer], expected, rtol=1e-5, atol=1e-6)


def test_updates_of_some_layers_are_refused_by_a_scanned_model(models, tmp_path):
    folder = loras.write(tmp_path, loras.pairs({Q: (24, 24)}), layers_to_transform=[0])
    with pytest.raises(InputError, match="query/kernel/a' has updates of 1 of the 2 layers: .*set model.scan to false"):
        adapted.read(folder, models["llama"].clone(scan=True), "base")


def without(*names):
    return {name: array for name, array in LORA.items() if name not in names}


BAD = {
    "IA3": (LORA, {"peft_type": "IA3"}, "llama", "peft_type 'IA3' is not supported.*supported: LORA .*SUPERTUNING"),
    "DoRA": (LORA, {"use_dora": True}, "llama", "use_dora: True is not supported.*supported: LORA"),
    "biases": (LORA, {"bias": "all"}, "llama", "bias is 'all', which trains biases; supported: 'none'"),
    "tokens": (
        LORA | {"model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((1, 24), np.float32)},
        {"trainable_token_indices": [3]},
        "llama",
        "trainable_token_indices",
    ),
    "an embedding": (
        {
            "model.embed_tokens.lora_embedding_A": np.ones((2, 36)),
            "model.embed_tokens.lora_embedding_B": np.ones((24, 2)),
        },
        {},
        "llama",
        "holds the embedding 'model.embed_tokens'",
    ),
    "another base": (
        LORA,
        {},
        "bert",
        r"does not fit BASE: no place for model.layers.0.self_attn.q_proj \(24, 24\), .* and 1 more; .*\(org/base\)",
    ),
    "other shapes": (
        loras.pairs(SHAPES | {Q: (32, 24)}),
        {},
        "llama",
        r"other shapes: model.layers.0.self_attn.q_proj is \(32, 24\) in the adapter, \(24, 24\) in the base; give",
    ),
    "other labels": (
        {"classifier.weight": np.ones((3, 24), np.float32)},
        {"modules_to_save": ["classifier"]},
        "bert",
        r"classifier.weight is \(3, 24\) in the adapter, \(2, 24\) in the base",
    ),
    "unexpected": (LORA | {"score.weight": np.ones((3, 24))}, {}, "llama", r"no place for score.weight \(3, 24\)"),
    "half a pair": (without(f"{Q}.lora_B.weight"), {}, "llama", f"update of '{Q}' is not a pair"),
    "missing": (
        without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
        {"target_modules": ["q_proj", "v_proj"]},
        "llama",
        f"no update of {Q}, which target_modules of adapter_config.json names",
    ),
    "no positions": (
        {f"{Q}.supertuning_values": np.ones(3, np.float32)},
        {"peft_type": "SUPERTUNING"},
        "llama",
        "lacks supertuning_indices: save it with save_precomputed_indices=True",
    ),
    "positions outside": (
        {f"{Q}.supertuning_values": np.ones(1, np.float32), f"{Q}.supertuning_indices": np.array([576], np.int32)},
        {"peft_type": "SUPERTUNING"},
        "llama",
        "is 577 or more entries in the adapter",
    ),
    "sparse values of a Conv1D": (
        {"h.0.mlp.c_fc.supertuning_values": np.ones(1, np.float32), "h.0.mlp.c_fc.supertuning_indices": np.array([1])},
        {"peft_type": "SUPERTUNING"},
        "gpt2",
        "h.0.mlp.c_fc has sparse values and is no linear layer",
    ),
    "not finite": (LORA | {f"{Q}.lora_A.weight": np.full((2, 24), np.nan, np.float32)}, {}, "llama", "NaN"),
}
"""Tensors, settings, base, and the line about them."""


@pytest.mark.parametrize("name", BAD)
def test_bad_adapter_is_one_line(models, tmp_path, name):
    arrays, settings, base, message = BAD[name]
    folder = loras.write(tmp_path, arrays, **settings)
    with pytest.raises(InputError, match=message) as error:
        peft_paths.to_saved(peft.read(folder), models[base], "BASE")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


MADE = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "llama, patterns": (
        "llama",
        {
            "target_modules": r".*\.(q|k|v|up)_proj",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 1},
            "alpha_pattern": {"v_proj": 9},
        },
    ),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "supertuning": ("llama", {"target_modules": ["q_proj", "down_proj"], "sparsity": 0.99, "r": 3}),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other
@pytest.mark.parametrize("name", MADE)
def test_adapter_that_peft_wrote_gives_its_logits(tmp_path, name):
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    base, settings = MADE[name]
    task, kind = ("causal-lm", "CausalLM") if base != "bert" else ("sequence-classification", "SequenceClassification")
    folder = tmp_path / "base"
    (tiny.bert if base == "bert" else decoders.write)(folder, **decoders.VARIANTS.get(base, {}))
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
    config = library.SupertuningConfig if name == "supertuning" else library.LoraConfig
    torch.manual_seed(0)
    theirs = library.get_peft_model(theirs, config(**{"r": 2, "lora_alpha": 5} | settings)).eval()
    for param in theirs.parameters():
        if param.requires_grad:
            param.data = 0.1 * torch.randn_like(param)
    theirs.save_pretrained(tmp_path / "lora")
    batch = tiny.batch(padded=False)
    if task == "causal-lm":
        del batch["token_type_ids"]
    with torch.no_grad():
        expected = theirs(**{name: torch.from_numpy(x).long() for name, x in batch.items()}).logits.numpy()
    model, params = dsee_jax.load_pretrained(folder, task)
    plain = np.asarray(dsee_jax.apply(model, params, None, batch))
    params, adapter = dsee_jax.load_adapter(tmp_path / "lora", model, params)
    logits = np.asarray(dsee_jax.apply(model, params, adapter, batch))
    print(f"{name}: {np.abs(logits - expected).max():.1e} of {np.abs(expected).max():.1e}")
    assert np.abs(plain - logits).max() > 1e-2
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
