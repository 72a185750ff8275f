"""The loss of prompts and responses against Hugging Face's, where a label of -100 has no weight."""

import jax.numpy as jnp
import numpy as np
import pytest

import dsee_jax
from dsee_jax import data, models
from dsee_jax.ckpt.tokenizer import load_tokenizer
from dsee_jax.config import DataConfig
from dsee_jax.data.batches import assemble
from dsee_jax.data.packing import pack
from dsee_jax.data.responses import encode, to_tokens
from dsee_jax.data.tokens import ends, pad_id
from dsee_jax.train.losses import cross_entropy

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def test_loss_of_e2e_equals_transformers(shared):
    """Eight pairs of a real Llama: one padded text per row, and packed rows."""
    torch = pytest.importorskip("torch")
    import transformers

    folder = shared / "data" / "stories260k"
    tokenizer = load_tokenizer(folder)
    names = {"train_file": "devset.csv", "dev_file": "testset_w_refs.csv"}
    task = data.load(DataConfig(source="e2e", dir=str(shared / "data" / "e2e"), examples=8, **names), seed=0)
    end = ends(folder, tokenizer)
    pairs = encode(tokenizer, task.train, ends=end, vocab_size=512)
    tokens = to_tokens(pairs, 352, pad_id=pad_id(tokenizer, end), where=task.train.where)

    length = int(tokens.lengths.max())
    ids, labels = np.zeros((8, length), np.int64), np.full((8, length), -100)
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt) + len(response)] = prompt + response
        labels[row, len(prompt) : len(prompt) + len(response)] = response
    mask = np.arange(length) < tokens.lengths[:, None]
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        batch = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        expected = float(theirs(**{name: torch.from_numpy(x) for name, x in batch.items()}).loss)

    model, params = dsee_jax.load_pretrained(folder, task="causal-lm")
    for dataset, limit in ((tokens, 8), (pack(tokens, 512), 4)):
        batch = assemble(dataset, np.arange(dataset.size), np.array([512]))
        inputs = {name: batch[name] for name in models.INPUTS}
        losses = cross_entropy(dsee_jax.apply(model, params, None, inputs), batch)
        assert dataset.size <= limit
        mean = jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])
        assert float(mean) == pytest.approx(expected, rel=1e-5)
