"""Adapters as models: they equal the materialized model or the definition of LoRA, and mismatches are named."""

import hashlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import decoders
import dsee_jax.ckpt.peft
import tiny
from dsee_jax import masks, tree
from dsee_jax.ckpt import adapter, hf, hf_names
from dsee_jax.config import DeltaConfig
from dsee_jax.deltas import create, fold
from dsee_jax.errors import InputError
from merge import __main__ as command
from merge.inputs import sources

RANDOM = np.random.default_rng(0)


def read_tensor(lazy):
    return lazy.read(0, int(np.prod(lazy.shape))).reshape(lazy.shape)


def drawn(params, config):
    """Return an adapter of random updates."""
    new = create.init(params, config, key=jax.random.key(0))
    return new.replace(deltas=jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape).astype(np.float32), new.deltas))


def write_base_and_adapter(folder, *, scale_sparse=True, head=True, family="bert"):
    """Write a base in ``base`` and an adapter in ``adapter``; return the materialized tensors by their names."""
    tiny.bert(folder / "base", model_type=family)
    model, params = hf.load_pretrained(folder / "base")
    config = DeltaConfig(
        targets=(".*/(query|value|up)/kernel",), rank=3, alpha=5.0, nonzeros=7, scale_sparse=scale_sparse
    )
    updates = drawn(params, config)
    pruned = {"encoder/layer_0/attention/query/kernel", "encoder/layer_1/attention/output/kernel"}
    kernel_masks = tree.unflatten({path: RANDOM.random(tree.get(params, path).shape) < 0.5 for path in pruned})
    new = {"classifier": {"kernel": RANDOM.normal(size=(24, 2)), "bias": RANDOM.normal(size=2)}} if head else {}
    new = jax.tree.map(lambda leaf: leaf.astype(np.float32), new)
    about = {"scale": config.scale, "scale_sparse": scale_sparse}
    (folder / "adapter").mkdir()
    adapter.save(folder / "adapter", adapter.Saved(updates.deltas, updates.supports, new, kernel_masks, about, {}))
    tuned = masks.apply(tree.unflatten({**tree.flatten(params), **tree.flatten(new)}), kernel_masks)
    return hf_names.hf_tensors(model, fold.materialize(tuned, updates))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta"])
@pytest.mark.parametrize("scale_sparse", [True, False])
def test_adapter_equals_the_materialized_model(tmp_path, scale_sparse, family):
    """Masks, low-rank and sparse updates and the head, in files that transpose kernels or store several in one tensor."""
    expected = write_base_and_adapter(tmp_path, scale_sparse=scale_sparse, family=family)
    source = sources.open_source("base+adapter", tmp_path)
    assert source.tensors.keys() == expected.keys()
    for name, lazy in source.tensors.items():
        np.testing.assert_allclose(read_tensor(lazy), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    files = ["adapter.safetensors", "adapter_config.json", "masks.safetensors"]
    assert list(source.files) == ["base/config.json", "base/model.safetensors", *(f"adapter/{file}" for file in files)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_decoder_adapter_equals_the_materialized_model(tmp_path, family):
    """Grouped heads, kernels stored (in, out), and three kernels in one tensor, each pruned and updated separately."""
    decoders.write(tmp_path / "base", **decoders.VARIANTS[family])
    model, params = hf.load_pretrained(tmp_path / "base", "causal-lm")
    config = DeltaConfig(targets=(".*/(query|value|up)/kernel",), rank=3, alpha=5.0, nonzeros=7)
    updates = drawn(params, config)
    pruned = [
        f"decoder/layer_{layer}/attention/{name}/kernel" for layer, name in ((0, "query"), (1, "key"), (1, "output"))
    ]
    kernel_masks = tree.unflatten({path: RANDOM.random(tree.get(params, path).shape) < 0.5 for path in pruned})
    (tmp_path / "adapter").mkdir()
    about = {"scale": config.scale, "scale_sparse": True}
    adapter.save(tmp_path / "adapter", adapter.Saved(updates.deltas, updates.supports, {}, kernel_masks, about, {}))
    folded = fold.materialize(masks.apply(params, kernel_masks), updates)
    expected, source = hf_names.hf_tensors(model, folded), sources.open_source("base+adapter", tmp_path)
    assert source.tensors.keys() == expected.keys()
    for name, lazy in source.tensors.items():
        np.testing.assert_allclose(read_tensor(lazy), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_adapter_adds_its_head_to_a_base_without_head(tmp_path):
    """The names of the base's tensors also lack the model's prefix."""
    expected = write_base_and_adapter(tmp_path)
    tiny.bert(tmp_path / "base", head=False, prefix=False)
    source = sources.open_source("base+adapter", tmp_path)
    for name in ("classifier.weight", "classifier.bias"):
        np.testing.assert_array_equal(read_tensor(source.tensors[name]), expected[name])
    name = "encoder.layer.1.intermediate.dense.weight"
    assert read_tensor(source.tensors[name]).shape == expected[f"bert.{name}"].shape
    assert not any(name.startswith("bert.") for name in source.tensors)


def rewrite(folder, **parts):
    saved = adapter.load(folder)
    adapter.save(folder, saved._replace(**parts))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {
                "deltas": {"encoder": {"layer_9": {"mlp": {"up": {"kernel": {"values": np.ones(1)}}}}}},
                "supports": {"encoder": {"layer_9": {"mlp": {"up": {"kernel": np.zeros((1, 2), np.int32)}}}}},
                "masks": {},
            },
            "layer.9.*no tensor",
        ),
        (
            {
                "deltas": {"elsewhere": {"kernel": {"values": np.ones(1)}}},
                "supports": {"elsewhere": {"kernel": np.zeros((1, 2), np.int32)}},
            },
            "no param 'elsewhere/kernel'",
        ),
        ({"supports": {}}, "is incomplete"),
        ({"deltas": {}}, "holds no updates"),
        ({"config": {"scale": 1.0}}, "scale_sparse is None"),
        ({"config": []}, "holds a list"),
    ],
)
def test_adapter_of_another_model_is_refused(tmp_path, parts, message):
    write_base_and_adapter(tmp_path, head=False)
    rewrite(tmp_path / "adapter", **parts)
    with pytest.raises(InputError, match=message):
        sources.open_source("base+adapter", tmp_path)


def test_misshapen_shared_tensor_is_named(tmp_path):
    """The width is not a multiple of the width of three heads."""
    write_base_and_adapter(tmp_path, family="deberta")
    fields = json.loads((tmp_path / "base" / "config.json").read_text())
    name = "deberta.encoder.layer.0.attention.self.in_proj.weight"
    tiny.write(tmp_path / "base", fields, tiny.weights(fields) | {name: np.zeros((70, 24), np.float32)})
    with pytest.raises(InputError, match=r"query/kernel' does not fit \(24, 0\), the shape of its kernel"):
        sources.open_source("base+adapter", tmp_path)


def test_support_outside_its_kernel_is_refused(tmp_path):
    write_base_and_adapter(tmp_path)
    saved = adapter.load(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", supports=jax.tree.map(lambda leaf: leaf + 30, saved.supports))
    with pytest.raises(InputError, match="does not fit"):
        sources.open_source("base+adapter", tmp_path)


BASE = {
    "model.embed.weight": RANDOM.normal(size=(5, 4)).astype(np.float32),
    "model.up.weight": RANDOM.normal(size=(6, 4)).astype(np.float32),
    "model.up.bias": RANDOM.normal(size=6).astype(np.float32),
    "model.down.weight": RANDOM.normal(size=(4, 6)).astype(np.float32),
    "score.weight": np.zeros((2, 4), np.float32),
    "count": np.array([7]),
}
A = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in {"up": (2, 4), "down": (2, 6)}.items()}
B = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in {"up": (6, 2), "down": (4, 2)}.items()}
UP = {"model.up.lora_A.weight": A["up"], "model.up.lora_B.weight": B["up"]}
DOWN = {"model.down.lora_A.weight": A["down"], "model.down.lora_B.weight": B["down"]}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}


def peft(folder, arrays, *, base=BASE, config=(), **settings):
    """Write a base, and an adapter of it in PEFT's layout; return the opened source."""
    for name in ("base", "lora"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps(dict(config)))
    save_file(base, folder / "base" / "model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(LORA | settings))
    prefixed = {f"base_model.model.{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(prefixed, folder / "lora" / "adapter_model.safetensors")
    return sources.open_source("base+lora", folder)


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, {"up": 3, "down": 3}),
        ({"use_rslora": True}, {"up": 6 / np.sqrt(2), "down": 6 / np.sqrt(2)}),
        ({"alpha_pattern": {"down": 1}}, {"up": 3, "down": 0.5}),
        ({"alpha_pattern": {"own": 1, "model.up": 4, r".*\.(up|down)": 2}}, {"up": 2, "down": 1}),
        ({"rank_pattern": {"up": 2}, "r": 16}, {"up": 3, "down": 3}),
    ],
)
def test_lora_is_w_plus_scale_b_a(tmp_path, settings, scales):
    """The scale is alpha / r, or alpha / sqrt(r); the first alpha pattern that matches the end of a name holds."""
    source = peft(tmp_path, UP | DOWN, **settings)
    for name, scale in scales.items():
        expected = BASE[f"model.{name}.weight"] + scale * B[name] @ A[name]
        np.testing.assert_allclose(read_tensor(source.tensors[f"model.{name}.weight"]), expected, rtol=1e-6, atol=1e-6)
    for name in BASE.keys() - {"model.up.weight", "model.down.weight"}:
        np.testing.assert_array_equal(read_tensor(source.tensors[name]), BASE[name], strict=True)
    assert source.tensors["model.up.weight"].dtype == "F32"
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} < source.files.keys()


def test_lora_of_in_out_weights_is_transposed(tmp_path):
    pair = {"model.up.lora_A.weight": A["down"], "model.up.lora_B.weight": B["down"]}
    source = peft(tmp_path, pair, fan_in_fan_out=True)
    expected = BASE["model.up.weight"] + 3 * (B["down"] @ A["down"]).T
    np.testing.assert_allclose(read_tensor(source.tensors["model.up.weight"]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flag", [False, True])
def test_biases_of_the_base_tell_the_layout_of_its_layers(tmp_path, flag):
    """PEFT writes the fan_in_fan_out of the last module; a square kernel fits both ways."""
    base = {
        "h.0.wide.weight": RANDOM.normal(size=(4, 6)).astype(np.float32),
        "h.0.wide.bias": np.zeros(6, np.float32),
        "h.0.square.weight": RANDOM.normal(size=(4, 4)).astype(np.float32),
    }
    a, b = RANDOM.normal(size=(2, 4)).astype(np.float32), RANDOM.normal(size=(4, 2)).astype(np.float32)
    pair = {"h.0.square.lora_A.weight": a, "h.0.square.lora_B.weight": b}
    source = peft(tmp_path, pair, base=base, fan_in_fan_out=flag)
    expected = base["h.0.square.weight"] + 3 * (b @ a).T
    np.testing.assert_allclose(read_tensor(source.tensors["h.0.square.weight"]), expected, rtol=1e-6, atol=1e-6)


def test_names_with_the_name_of_the_adapter_are_read(tmp_path):
    arrays = {f"{name.removesuffix('weight')}default.weight": array for name, array in UP.items()}
    source = peft(tmp_path, arrays)
    expected = BASE["model.up.weight"] + 3 * B["up"] @ A["up"]
    np.testing.assert_allclose(read_tensor(source.tensors["model.up.weight"]), expected, rtol=1e-6, atol=1e-6)


def test_lora_of_an_embedding_is_transposed(tmp_path):
    a, b = RANDOM.normal(size=(2, 5)).astype(np.float32), RANDOM.normal(size=(4, 2)).astype(np.float32)
    source = peft(tmp_path, {"model.embed.lora_embedding_A": a, "model.embed.lora_embedding_B": b})
    expected = BASE["model.embed.weight"] + 3 * (b @ a).T
    np.testing.assert_allclose(read_tensor(source.tensors["model.embed.weight"]), expected, rtol=1e-6, atol=1e-6)


def test_saved_modules_and_biases_replace_the_tensors_of_the_base(tmp_path):
    """A saved module may have another number of rows, or be new."""
    head, fresh = np.ones((3, 4), np.float32), np.ones(3, np.float32)
    bias = np.full(6, 2, np.float32)
    arrays = UP | {"score.weight": head, "score.bias": fresh, "model.up.base_layer.bias": bias}
    source = peft(tmp_path, arrays, modules_to_save=["score"])
    np.testing.assert_array_equal(read_tensor(source.tensors["score.weight"]), head)
    np.testing.assert_array_equal(read_tensor(source.tensors["score.bias"]), fresh)
    np.testing.assert_array_equal(read_tensor(source.tensors["model.up.bias"]), bias)
    assert source.tensors.keys() == BASE.keys() | {"score.bias"}


def test_base_without_the_prefix_of_its_adapter_is_matched(tmp_path):
    source = peft(tmp_path, {f"whole.{name}": array for name, array in UP.items()})
    expected = BASE["model.up.weight"] + 3 * B["up"] @ A["up"]
    np.testing.assert_allclose(read_tensor(source.tensors["model.up.weight"]), expected, rtol=1e-6, atol=1e-6)


LM = {
    "model.embed_tokens.weight": RANDOM.normal(size=(5, 4)).astype(np.float32),
    "model.layers.0.up.weight": BASE["model.up.weight"],
}
TIED = {"tie_word_embeddings": True, "vocab_size": 5, "architectures": ["XForCausalLM"]}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LORA_A, LORA_B = (RANDOM.normal(size=shape).astype(np.float32) for shape in ((2, 4), (5, 2)))
LORA_OF_HEAD = {"lm_head.lora_A.weight": LORA_A, "lm_head.lora_B.weight": LORA_B}
LORA_OF_EMBEDDING = {"model.embed_tokens.lora_embedding_A": LORA_B.T, "model.embed_tokens.lora_embedding_B": LORA_A.T}
UPDATED = LM["model.embed_tokens.weight"] + 3 * LORA_B @ LORA_A
TRAINED, OTHER = (RANDOM.normal(size=(5, 4)).astype(np.float32) for _ in range(2))
MORE = RANDOM.normal(size=(7, 4)).astype(np.float32)
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


def with_rows(matrix):
    changed = matrix.copy()
    changed[[3, 1]] = ROWS
    return changed


@pytest.mark.parametrize(
    ("arrays", "settings", "embedding", "head"),
    [
        (LORA_OF_EMBEDDING, {}, UPDATED, LM[EMBEDDING]),
        (LORA_OF_HEAD, {}, LM[EMBEDDING], UPDATED),
        ({EMBEDDING: TRAINED}, {"modules_to_save": ["embed_tokens"]}, TRAINED, LM[EMBEDDING]),
        ({HEAD: TRAINED}, {"modules_to_save": ["lm_head"]}, LM[EMBEDDING], TRAINED),
        ({HEAD: TRAINED, EMBEDDING: OTHER}, {"modules_to_save": ["lm_head", "embed_tokens"]}, OTHER, TRAINED),
        ({HEAD: TRAINED, EMBEDDING: TRAINED}, {"modules_to_save": ["lm_head", "embed_tokens"]}, TRAINED, None),
        ({HEAD: MORE, EMBEDDING: MORE}, {}, MORE, None),
        ({EMBEDDING: MORE}, {}, MORE, None),
        (
            {"model.embed_tokens.token_adapter.trainable_tokens_delta": ROWS},
            {"trainable_token_indices": [3, 1]},
            with_rows(LM[EMBEDDING]),
            None,
        ),
        (
            {"lm_head.token_adapter.trainable_tokens_delta": ROWS},
            {"trainable_token_indices": {"lm_head": [3, 1]}},
            LM[EMBEDDING],
            with_rows(LM[EMBEDDING]),
        ),
    ],
)
def test_tied_matrix_is_untied_only_where_the_two_become_different(tmp_path, arrays, settings, embedding, head):
    """An update changes one module; the tied partner keeps the values of the base."""
    source = peft(tmp_path, arrays, base=LM, config=TIED, **settings)
    np.testing.assert_allclose(read_tensor(source.tensors[EMBEDDING]), embedding, rtol=1e-6, atol=1e-6)
    assert (HEAD in source.tensors) == (head is not None)
    assert source.config["tie_word_embeddings"] is (head is None)
    assert source.config["vocab_size"] == len(embedding)
    if head is not None:
        np.testing.assert_allclose(read_tensor(source.tensors[HEAD]), head, rtol=1e-6, atol=1e-6)


def test_resized_matrices_must_have_equal_rows(tmp_path):
    untied = {"base": LM | {HEAD: TRAINED}, "config": TIED | {"tie_word_embeddings": False}}
    source = peft(tmp_path, {HEAD: MORE, EMBEDDING: MORE}, **untied)
    assert source.config["vocab_size"] == 7
    with pytest.raises(InputError, match="resizes not all matrices of tokens: .*5 rows.*7 rows|7 rows.*5 rows"):
        peft(tmp_path, {EMBEDDING: MORE}, **untied)
    with pytest.raises(InputError, match=r"lm_head.weight has 7 rows and the tied .* 5"):
        peft(tmp_path, {HEAD: MORE}, base=LM, config=TIED)
    with pytest.raises(InputError, match=r"up.weight' is \(7, 4\); the base has \(6, 4\) there"):
        peft(tmp_path, {"model.up.weight": MORE})


@pytest.mark.parametrize(
    ("task", "suffix"), [("SEQ_CLS", "SequenceClassification"), ("TOKEN_CLS", "TokenClassification")]
)
def test_head_of_an_adapter_gives_class_and_labels(tmp_path, task, suffix):
    """The base's own head is left out; labels that fit are kept."""
    score = {"score.weight": np.ones((3, 4), np.float32)}
    before = {"pre_classifier.weight": np.ones((4, 4), np.float32)}
    config = TIED | {"tie_word_embeddings": False, "id2label": {"0": "no", "1": "yes"}}
    made = {
        "base": LM | {HEAD: TRAINED},
        "config": config,
        "task_type": task,
        "modules_to_save": ["classifier", "score"],
    }
    source = peft(tmp_path, score | before, **made)  # PEFT compares the ends of names
    assert source.tensors.keys() == {*LM, *score, *before}
    assert source.config["architectures"] == [f"XFor{suffix}"]
    assert source.config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    named = config | {"id2label": {str(label): name for label, name in enumerate("abc")}}
    assert peft(tmp_path, score, **made | {"config": named}).config["id2label"] == named["id2label"]


def test_own_head_of_a_run_gives_class_and_labels(tmp_path):
    """On the pretrained base, of another class."""
    write_base_and_adapter(tmp_path)
    saved = adapter.load(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", config=saved.config | {"labels": ["no", "yes"]})
    tiny.bert(tmp_path / "base", head=False, architectures=["BertForMaskedLM"])
    source = sources.open_source("base+adapter", tmp_path)
    assert source.config["architectures"] == ["BertForSequenceClassification"]
    assert source.config["id2label"] == {"0": "no", "1": "yes"}


def test_pattern_that_matches_for_ever_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dsee_jax.ckpt.peft.SECONDS", 0.1)
    with pytest.raises(InputError, match="alpha_pattern .* takes more than 0.1 s"):
        dsee_jax.ckpt.peft._matches(r"(?:(?:\S|.)+)+(?<!\w)", "model.layers.0.mlp.up_proj", tmp_path)
    assert peft(tmp_path, UP, alpha_pattern={r"(model\.)?(\w+\.)*(up|down)_proj": 1})
    assert peft(tmp_path, UP, alpha_pattern={r".*\.layers\.\d+\..*(up|down)": 1})


def test_tokenizer_of_an_adapter_is_taken_if_it_fits(tmp_path, caplog):
    source = peft(tmp_path, UP, config={"vocab_size": 40})
    assert source.tokenizer == tmp_path / "base"
    tiny.tokenizer(tmp_path / "lora")
    assert peft(tmp_path, UP, config={"vocab_size": 40}).tokenizer == tmp_path / "lora"
    assert peft(tmp_path, UP, config={"vocab_size": 7}).tokenizer == tmp_path / "base"
    assert "has a token in row 36, and the model with the adapter has 7 rows" in caplog.text


def test_adapter_on_other_weights_is_refused_unless_allowed(tmp_path, capsys):
    """The message names both hashes. The plan reads headers only."""
    write_base_and_adapter(tmp_path)
    saved = adapter.load(tmp_path / "adapter")
    rewrite(tmp_path / "adapter", config=saved.config | {adapter.BASE_SHA256: adapter.fingerprint(tmp_path / "base")})
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: base+adapter}]\n")
    source = sources.open_source("base+adapter", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    assert sources.check_bases([source]) == {file: hashlib.sha256(file.read_bytes()).hexdigest()}
    tiny.bert(tmp_path / "base", seed=1)
    out, names = str(tmp_path / "out"), [str(tmp_path / "base"), f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"]
    assert command.main([str(recipe), out, "--plan"]) == 0
    for arguments in ([str(recipe), out], ["compare", *names]):
        capsys.readouterr()
        assert command.main(arguments) == 2
        line = capsys.readouterr().err
        assert adapter.fingerprint(tmp_path / "base")[:12] in line
        assert "--allow-changed-base" in line
        assert command.main([*arguments, "--allow-changed-base"]) == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"model.upp.lora_A.weight": A["up"], "model.upp.lora_B.weight": B["up"]},
            "no tensor 'model.upp.weight'.*mean",
        ),
        ({"model.up.lora_A.weight": A["up"]}, "not a pair"),
        ({}, "adapter_model.safetensors holds no tensors"),
        (
            {"model.up.lora_A.weight": A["down"], "model.up.lora_B.weight": B["up"]},
            r"\(6, 2\) times \(2, 6\).*\(6, 4\)",
        ),
        ({"model.up.lora_A.weight": A["up"][:1], "model.up.lora_B.weight": B["up"]}, r"\(6, 2\) times \(1, 4\)"),
        ({"model.up.lora_A.weight": A["up"][..., None], "model.up.lora_B.weight": B["up"]}, "not a pair of matrices"),
        (UP | {"model.up.lora_magnitude_vector": np.ones(6)}, "lora_magnitude_vector.*is not part"),
        (UP | {"model.other.weight": np.ones(6)}, "no tensor 'model.other.weight'"),
        ({"count.lora_A.weight": A["up"], "count.lora_B.weight": B["up"]}, "no tensor 'count.weight'"),
        ({"model.up.bias.lora_A.weight": A["up"], "model.up.bias.lora_B.weight": B["up"]}, "no tensor"),
    ],
)
def test_unmatched_adapter_tensor_is_refused(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        peft(tmp_path, arrays)


def test_tensor_without_the_prefix_of_peft_is_refused(tmp_path):
    peft(tmp_path, UP)
    save_file(UP, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(InputError, match="'model.up.lora_A.weight' is not part of a supported adapter"):
        sources.open_source("base+lora", tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"use_dora": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "OLoRA"},
        {"lora_alpha": None},
        {"lora_alpha": "six"},
        {"alpha_pattern": {"(": 1}},
    ],
)
def test_unsupported_peft_setting_is_named(tmp_path, settings):
    with pytest.raises(InputError, match=f"adapter_config.json: .*{next(iter(settings)).partition('_pattern')[0]}"):
        peft(tmp_path, UP, **settings)


def test_folder_without_adapter_is_refused(tmp_path):
    peft(tmp_path, UP)
    (tmp_path / "lora" / "adapter_model.safetensors").rename(tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle.*save_pretrained"):
        sources.open_source("base+lora", tmp_path)
    with pytest.raises(InputError, match="holds no adapter"):
        sources.open_source("base+base", tmp_path)
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"\x09")
    with pytest.raises(InputError, match="not a complete safetensors file"):
        sources.open_source("base+lora", tmp_path)


@pytest.mark.parity
def test_lora_equals_the_merge_of_peft(tmp_path):
    """A folder that PEFT wrote, against PEFT's merge_and_unload, for linear layers and an embedding."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 6)
            self.down, self.score = torch.nn.Linear(6, 4), torch.nn.Linear(4, 2)

        def forward(self, ids):
            return self.score(self.down(self.up(self.embed(ids))))

    torch.manual_seed(0)
    model = Model()
    base = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    config = library.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["embed", "up", "down"],
        modules_to_save=["score"],
        rank_pattern={"down": 2},
        alpha_pattern={"down": 7},
        use_rslora=True,
        bias="lora_only",
    )
    tuned = library.get_peft_model(model, config)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(base, tmp_path / "base" / "model.safetensors")
    tuned.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    source = sources.open_source("base+lora", tmp_path)
    merged = tuned.merge_and_unload().state_dict()
    assert source.tensors.keys() == merged.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(read_tensor(source.tensors[name]), tensor.detach().numpy(), rtol=1e-5, atol=1e-5)
        changed = not np.array_equal(read_tensor(source.tensors[name]), base[name])
        assert changed, f"{name} was to be tuned"


PEFT_CASES = {
    "rslora": (False, {"use_rslora": True, "target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"q_proj": 3}}),
    "tied embedding": (True, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "saved embedding": (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "saved both": (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens": (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "tokens of both": (
        True,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3], "lm_head": [7]}},
    ),
    "resized": (False, {"target_modules": ["q_proj"], "rows": 34}),
    "resized tied": (True, {"target_modules": ["q_proj"], "rows": 34}),
    "classifier": (False, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about each other
@pytest.mark.parametrize("name", PEFT_CASES)
def test_merged_folder_gives_the_logits_of_peft(tmp_path, name):
    """The folder of the merge, opened by transformers, against the base with the adapter attached by PEFT."""
    torch, library = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    tied, settings = PEFT_CASES[name]
    settings = {"task_type": "CAUSAL_LM"} | settings
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=32, tie_word_embeddings=tied, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    classifies = settings["task_type"] == "SEQ_CLS"
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "base", **({"num_labels": 3} if classifies else {}))
    if rows := settings.pop("rows", None):
        model.resize_token_embeddings(rows, mean_resizing=False)
    attached = library.get_peft_model(model, library.LoraConfig(r=4, lora_alpha=8, **settings)).eval()
    for param in attached.parameters():
        if param.requires_grad:
            param.data = 0.1 * torch.randn_like(param)
    attached.save_pretrained(tmp_path / "lora")
    (tmp_path / "recipe.yml").write_text("merge_method: passthrough\nmodels: [{model: base+lora}]\n")
    assert command.main([str(tmp_path / "recipe.yml"), str(tmp_path / "out")]) == 0
    with torch.no_grad():
        ids = torch.arange(1, 9)[None]
        expected, logits = (each(ids).logits for each in (attached, kind.from_pretrained(tmp_path / "out").eval()))
    np.testing.assert_allclose(logits, expected, atol=1e-5)
