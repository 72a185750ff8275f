"""Write a small GPT-2 of random weights in Hugging Face layout, with a byte-level BPE tokenizer trained on given texts.

``python -m benchmarks.random_gpt2 OUT --texts E2E_DIR/devset.csv`` writes the base model of configs/gpt2_e2e_full.yaml.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"


def tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of at most ``vocabulary`` tokens, including the end of text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return bpe


def config(vocabulary: int, *, layers: int, width: int, heads: int, positions: int) -> dict:
    """Return the ``config.json``."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "n_positions": positions,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def tensors(settings: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Return ``{name: array}``, kernels (in, out), initialised as GPT-2: output projections are smaller by sqrt(2 layers)."""
    generator = np.random.default_rng(seed)
    width, layers = settings["n_embd"], settings["n_layer"]
    arrays: dict[str, np.ndarray] = {}

    def normal(name: str, *shape: int, scale: float = 1.0) -> None:
        arrays[f"transformer.{name}.weight"] = generator.normal(0, 0.02 * scale, shape).astype(np.float32)

    normal("wte", settings["vocab_size"], width)
    normal("wpe", settings["n_positions"], width)
    for number in range(layers):
        for name, rows, columns, scale in (
            ("attn.c_attn", width, 3 * width, 1.0),
            ("attn.c_proj", width, width, (2 * layers) ** -0.5),
            ("mlp.c_fc", width, 4 * width, 1.0),
            ("mlp.c_proj", 4 * width, width, (2 * layers) ** -0.5),
        ):
            normal(f"h.{number}.{name}", rows, columns, scale=scale)
            arrays[f"transformer.h.{number}.{name}.bias"] = np.zeros(columns, np.float32)
    for name in (*(f"h.{number}.ln_{part}" for number in range(layers) for part in (1, 2)), "ln_f"):
        arrays[f"transformer.{name}.weight"] = np.ones(width, np.float32)
        arrays[f"transformer.{name}.bias"] = np.zeros(width, np.float32)
    return arrays


def write(
    out: Path,
    texts: Path,
    *,
    vocabulary: int = 1024,
    layers: int = 4,
    width: int = 256,
    heads: int = 8,
    positions: int = 256,
    seed: int = 0,
) -> None:
    """Write the model folder ``out``; the tokenizer is trained on all cells of the CSV file ``texts``."""
    with texts.open(newline="", encoding="utf-8") as file:
        bpe = tokenizer([cell for row in csv.reader(file) for cell in row], vocabulary)
    settings = config(bpe.get_vocab_size(), layers=layers, width=width, heads=heads, positions=positions)
    out.mkdir(parents=True, exist_ok=True)
    bpe.save(str(out / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "unk_token": END}
    (out / "tokenizer_config.json").write_text(json.dumps(names | {"model_max_length": positions}, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_file(tensors(settings, seed), out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--texts", type=Path, required=True, metavar="CSV", help="training texts of the tokenizer")
    for name, value in (
        ("vocabulary", 1024),
        ("layers", 4),
        ("width", 256),
        ("heads", 8),
        ("positions", 256),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    options = vars(parser.parse_args())
    write(options.pop("out"), options.pop("texts"), **options)


if __name__ == "__main__":
    main()
