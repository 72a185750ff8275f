"""A tiny model and a batch of examples of two lengths, for sums over examples."""

import numpy as np

import dsee_jax
import tiny
from dsee_jax import models


def case(folder, *, labels=2, layers=1, family="bert"):
    """A model, its params, and a batch of four rows of two lengths; the last row is a filler."""
    model, params = dsee_jax.load_pretrained(
        tiny.bert(folder, labels=labels, num_hidden_layers=layers, model_type=family), num_labels=labels
    )
    batch = tiny.batch(rows=4, length=10, types=model.config.type_vocab_size)
    batch["attention_mask"][2:] = batch["attention_mask"][:2]
    return model, params, batch | {"weights": np.array([1, 1, 1, 0], np.float32)}


def alone(batch, row):
    """Row ``row`` of a batch, without padding."""
    length = int(batch["attention_mask"][row].sum())
    return {name: batch[name][row : row + 1, :length] for name in models.INPUTS}
