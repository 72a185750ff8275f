"""Side: training steps of KerasHub on JAX, a text classifier with ``enable_lora``."""

import os

os.environ["KERAS_BACKEND"] = "jax"

from typing import Any

import jax
import keras
import keras_hub
import numpy as np
import tensorflow
from safetensors.numpy import load_file

from benchmarks.peers import child, inputs

INCLUDES = (
    "forward with dropout, backward, clipping to norm 1, AdamW, the mean of the loss that fit keeps; a round is one fit of "
    "several steps, which ends with the loss on the host. enable_lora chooses the updates: query and value, A with a block "
    "for each head, their biases too. Pooler and classifier are trained in full, as on the other sides"
)


def prepare(case: dict[str, Any]) -> child.Side:
    assert case["dtype"] == "float32", "KerasHub is compared in float32"
    backbone = keras_hub.models.BertBackbone.from_preset(case["model"], dtype=case["dtype"])
    model = keras_hub.models.BertTextClassifier(backbone=backbone, num_classes=2, preprocessor=None)
    weights = load_file(f"{case['model']}/model.safetensors")
    model.output_dense.kernel.assign(weights["classifier.weight"].T)
    model.output_dense.bias.assign(weights["classifier.bias"])
    del weights  # the peak of memory is compared
    backbone.enable_lora(case["rank"])
    backbone.pooled_dense.trainable = True
    for layer in backbone._flatten_layers(include_self=False):
        # The weights are of a model with the exact GELU, which KerasHub approximates.
        if isinstance(layer, keras_hub.layers.TransformerEncoder):
            layer._feedforward_intermediate_dense.activation = keras.activations.get("gelu")
        # Their scale is alpha over the rank, as on the other sides.
        if getattr(layer, "lora_enabled", False):
            layer.lora_alpha = 32
    model.compile(
        optimizer=keras.optimizers.AdamW(5e-4, weight_decay=0.01, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[],
        jit_compile=True,
    )
    ids, labels = inputs.ids(case, backbone.vocabulary_size).astype(np.int32), inputs.labels(case)
    batch = {"token_ids": ids, "padding_mask": np.ones_like(ids), "segment_ids": np.zeros_like(ids)}
    logits = np.asarray(model.predict(batch, batch_size=len(ids), verbose=0), np.float64)
    loss = float(np.ravel(model.evaluate(batch, labels, batch_size=len(ids), verbose=0))[0])
    rates = [each.rate for each in model._flatten_layers() if isinstance(each, keras.layers.Dropout)]
    check = {"loss": loss, "logits": logits[: inputs.CHECKED].tolist(), "dropout": max(rates, default=0.0)}

    # Without the thread that tunes it: a fit may wait for that thread, at the end, until its time has doubled.
    untuned = tensorflow.data.Options()
    untuned.autotune.enabled = False
    rows = tensorflow.data.Dataset.from_tensor_slices((batch, labels)).batch(len(ids)).with_options(untuned)

    def fit(steps: int) -> float:
        history = model.fit(rows.repeat(steps), verbose=0)
        return history.history["loss"][-1]

    # A fit takes time of its own, so a round is one call of as many steps as it has time for, and of four at least.
    few = child.repeated(lambda: fit(4), {"warmup": case["warmup"], "round": 0})(0)["seconds"]
    steps = max(4, round(4 * case["round"] / few))
    measure = child.repeated(lambda: fit(steps), {"warmup": 2, "round": 0})
    facts = {
        "step": INCLUDES,
        "trained_parameters": sum(int(np.prod(weight.shape)) for weight in model.trainable_weights),
        "dropout": check["dropout"],
        "device": jax.devices()[0].device_kind,
        "threads": os.environ["PEERS_THREADS"],
        "versions": child.versions("jax", "jaxlib", "keras", "keras-hub", "tensorflow"),
    }

    def per_step(number: int) -> dict[str, float]:
        figures = measure(number)
        return {"seconds": figures["seconds"] / steps, "calls": steps, "peak_bytes": child.peak()}

    return child.Side(per_step, facts, check)


if __name__ == "__main__":
    child.serve(prepare)
