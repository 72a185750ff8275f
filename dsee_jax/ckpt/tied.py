"""The output matrix of a decoder whose config ties it to the embedding: the tensors of the file decide.

A file may hold the output matrix too. Where it equals the embedding it is not read; where it differs, as after tuning that
trained both, the model is untied, as in transformers 5. Where the file has the output matrix alone, it is the embedding.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from dsee_jax import models, tree
from dsee_jax.ckpt import tensors
from dsee_jax.ckpt.hf_names import tensor_of
from dsee_jax.ckpt.spelling import unwrapped
from dsee_jax.ckpt.tensors import Stored
from dsee_jax.models.architecture import Model

log = logging.getLogger(__name__)


def resolve(folder: Path, model: Model, index: Mapping[str, Stored]) -> tuple[Model, Mapping[str, Stored]]:
    """Return the model, untied where its file holds another output matrix, and the file's tensors by their names.

    Args:
      folder: named in the warning.
      model: its config may tie the output matrix.
      index: the tensors of the folder, see `tensors.index`.
    """
    architecture = models.find(model.config.model_type)
    if architecture.tied is None or not getattr(model.config, "tie_word_embeddings", False):
        return model, index
    untied = model.clone(config=dataclasses.replace(model.config, tie_word_embeddings=False))
    if architecture.tied[0] not in tree.flatten(models.shapes(untied)):
        return model, index  # a task without an output matrix over the vocabulary
    wanted = [tensor_of(architecture, path)[0] for path in architecture.tied]
    prefix, today = architecture.prefix, {unwrapped(name): name for name in index}
    head, embedding = (today.get(name, today.get(name.removeprefix(prefix))) for name in wanted)
    if head is None:
        return model, index
    if embedding is None:
        return model, {wanted[1] if name == head else name: stored for name, stored in index.items()}
    if tensors.equal(index[head], index[embedding]):
        return model, index
    log.warning(
        "%s: %s differs from %s, and config.json has tie_word_embeddings true: the model is untied and keeps both",
        *(folder, head, embedding),
    )
    return untied, index
