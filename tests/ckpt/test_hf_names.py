"""Targets that name modules as Hugging Face and PEFT do."""

import pytest

import decoders
import tiny
from dsee_jax import models, tree
from dsee_jax.ckpt import hf, hf_names

LAYER = r"decoder/layer_\d+"
CASES = [
    ("llama", ["q_proj", "self_attn.v_proj"], [f"{LAYER}/attention/query/kernel", f"{LAYER}/attention/value/kernel"]),
    ("llama", ["model.layers.1.mlp.up_proj"], ["decoder/layer_1/mlp/up/kernel"]),
    ("llama", ["lm_head", "query", "mlp/up", ".*/gate/kernel"], ["lm_head", "query", "mlp/up", ".*/gate/kernel"]),
    ("gpt2", ["c_attn"], [f"{LAYER}/attention/{part}/kernel" for part in ("key", "query", "value")]),
    ("gpt2", ["c_proj"], [f"{LAYER}/attention/output/kernel", f"{LAYER}/mlp/down/kernel"]),
    ("bert", ["intermediate.dense"], [r"encoder/layer_\d+/mlp/up/kernel"]),
    ("bert", ["proj", "self.quer"], ["proj", "self.quer"]),
]


@pytest.mark.parametrize(("kind", "targets", "rules"), CASES)
def test_names_of_modules_become_rules(kind, targets, rules, tmp_path):
    folder = tiny.bert(tmp_path) if kind == "bert" else decoders.write(tmp_path, model_type=kind)
    model = hf.abstract_model(folder, "features" if kind == "bert" else "causal-lm")
    assert sorted(hf_names.to_rules(model, targets)) == sorted(rules)


def test_rules_select_the_stacked_kernels(tmp_path):
    model = hf.abstract_model(decoders.write(tmp_path), "causal-lm", scan=True)
    rules = hf_names.to_rules(model, ["q_proj", "o_proj"])
    paths = tree.select(rules, tree.flatten(models.shapes(model)))
    assert paths == ["decoder/layers/attention/output/kernel", "decoder/layers/attention/query/kernel"]
