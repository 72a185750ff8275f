"""The loss of prompts and responses against Hugging Face's, which takes -100 for what does not count."""

import jax.numpy as jnp
import numpy as np
import pytest

import dsee_jax
from dsee_jax import data, models
from dsee_jax.config import DataConfig
from dsee_jax.data.batches import assemble
from dsee_jax.data.packing import pack
from dsee_jax.data.responses import encode, lay
from dsee_jax.data.tokens import ends, load_tokenizer, padding
from dsee_jax.train import step

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


def test_the_loss_of_e2e_on_a_real_llama(shared):
    """Eight pairs with a text a row, padded, as transformers computes them; and packed, as here alone."""
    torch = pytest.importorskip("torch")
    import transformers

    folder = shared / "data" / "stories260k"
    tokenizer = load_tokenizer(folder)
    names = {"train_file": "devset.csv", "dev_file": "testset_w_refs.csv"}
    task = data.load(DataConfig(source="e2e", dir=str(shared / "data" / "e2e"), examples=8, **names), seed=0)
    end = ends(folder, tokenizer)
    pairs = encode(tokenizer, task.train, ends=end, vocab_size=512)
    tokens = lay(pairs, 352, pad_id=padding(tokenizer, end), where=task.train.where)

    length = int(tokens.lengths.max())
    ids, labels = np.zeros((8, length), np.int64), np.full((8, length), -100)
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt) + len(response)] = prompt + response
        labels[row, len(prompt) : len(prompt) + len(response)] = response
    mask = np.arange(length) < tokens.lengths[:, None]
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}
        expected = float(theirs(**{name: torch.from_numpy(x) for name, x in given.items()}).loss)

    model, params = dsee_jax.load_pretrained(folder, task="causal-lm")
    for laid, rows in ((tokens, 8), (pack(tokens, 512), 4)):
        batch = assemble(laid, np.arange(laid.size), np.array([512]))
        inputs = {name: batch[name] for name in models.INPUTS}
        losses = step.losses(dsee_jax.apply(model, params, None, None, inputs), batch["labels"], regression=False)
        assert laid.size <= rows
        found = jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])
        assert float(found) == pytest.approx(expected, rel=1e-5)
