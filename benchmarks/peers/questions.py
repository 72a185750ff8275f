"""The questions: which sides are measured on which cases."""

from collections.abc import Mapping
from typing import Any, NamedTuple

TORCH, PEFT = ("torch", "transformers"), ("torch", "transformers", "peft")


class Peer(NamedTuple):
    """A side of a question."""

    title: str
    """Its name in tables."""
    module: str
    """The module of this package that the process runs."""
    environment: str = ""
    """A key of `environments.ENVIRONMENTS`; empty: the environment of this library."""
    needs: tuple[str, ...] = ()
    """The packages with which this library's environment can stand in."""
    options: Mapping[str, Any] = {}
    """Added to the case. ``memory``: the process has the memory settings of this library's commands."""


class Question(NamedTuple):
    """A comparison."""

    title: str
    about: str
    """The measured quantity, in a sentence below the title of the table."""
    sides: Mapping[str, Peer]
    """By name; the first is this library."""
    cases: Mapping[str, Mapping[str, Any]]
    """By title. Keys that the harness reads: ``shape``, the model of random weights, or ``pretrained``, that of ``--model``;
    ``task`` of GLUE and ``examples``; ``checkpoints`` and ``checked``, models of merges; ``without``, sides that do not answer
    this case."""
    small: Mapping[str, Mapping[str, Any]]
    """Cases of tiny shapes, to try the path."""
    ratios: tuple[tuple[str, str], ...] = ()
    """Which side over which; empty: the first over each other."""
    metrics: tuple[str, ...] = ("seconds",)
    """The figures of a round that are compared where both sides have them; lower is better."""
    scores: tuple[str, ...] = ()
    """The figures of a round that are only reported."""
    fresh: bool = False
    """Whether each round is a new process."""
    tolerance: float = 1e-4
    """Of the numbers by which the sides are checked (`rounds.check`)."""
    packages: tuple[str, ...] = ("dsee_jax",)
    """The packages of this checkout that decide the figures."""
    training: bool = False
    """Whether a call is a training step, whose FLOPs are counted."""
    minutes: float = 0.0
    """About how long the question takes with five pairs, on two cores."""

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Return the ratios."""
        first, *others = self.sides
        return self.ratios or tuple((first, other) for other in others)


def _train(shape: str, batch: int, length: int, **more: Any) -> dict[str, Any]:
    """Return a case of training steps; float32, layers one by one, a round of 6 seconds."""
    sizes = {"shape": shape, "batch": batch, "length": length, "dtype": "float32", "rank": 16, "nonzeros": 64}
    return sizes | {"scan": False, "remat": False, "round": 6.0, "warmup": 2} | more


def _tiny(shape: str, **more: Any) -> dict[str, Any]:
    return _train(shape, 2, 16, rank=4, nonzeros=12, round=0.05) | more


_SIDES: dict[str, Peer] = {
    "ours": Peer("DSEE", "ours_train", options={"memory": True}),
    "peft": Peer("PEFT LoRA", "torch_train", "torch", PEFT, {"update": "lora", "compile": False}),
    "peft_memory": Peer(
        "PEFT LoRA, our memory settings",
        "torch_train",
        "torch",
        PEFT,
        {"update": "lora", "compile": False, "memory": True},
    ),
    "peft_compiled": Peer(
        "PEFT LoRA, torch.compile", "torch_train", "torch", PEFT, {"update": "lora", "compile": True}
    ),
    "supertuning": Peer("PEFT Supertuning", "torch_train", "torch", PEFT, {"update": "supertuning", "compile": False}),
    "keras": Peer(
        "KerasHub on JAX, enable_lora", "keras_train", "keras", ("keras_hub", "keras", "tensorflow", "safetensors")
    ),
}

_ALLOCATOR = (
    "Our sides set the thresholds of the C library's allocator as the commands of this library do "
    "(`dsee_jax.runtime.malloc.keep_freed_memory`); peers run as they come"
)

_STEP = (
    "Seconds of a training step: forward with dropout, backward, clipping, AdamW; full rows. DSEE: rank 16 and 64 nonzeros on "
    "query and value; LoRA of rank 16 on the same kernels; of an encoder the pooler and the classifier are trained too. "
    "PEFT's LoRA trains as many numbers as the low-rank part of DSEE, Supertuning as many as DSEE. DSEE has the memory "
    "settings of its commands; peers run as they come, and LoRA once more with these settings."
)


def _forward(shape: str, batch: int, length: int, **more: Any) -> dict[str, Any]:
    return {"shape": shape, "batch": batch, "length": length, "round": 1.0, "warmup": 3} | more


def _generate(shape: str, batch: int, beams: int, **more: Any) -> dict[str, Any]:
    sizes = {"shape": shape, "batch": batch, "length": 32, "new": 64, "beams": beams}
    return sizes | {"round": 2.0, "warmup": 2} | more


def _run(task: str, examples: int, **more: Any) -> dict[str, Any]:
    """Return a case of a run: MiniLM, batches of 32, at most 128 tokens."""
    model = {"pretrained": True, "shape": "minilm", "update": "lora", "rank": 16, "nonzeros": 64}
    return model | {"task": task, "examples": examples, "batch": 32, "length": 128} | more


def _tiny_run(**more: Any) -> dict[str, Any]:
    return _run("sst2", 24, shape="tiny-bert", pretrained=False, batch=12, rank=4, nonzeros=8) | more


def _merges(shape: str, *methods: str) -> dict[str, dict[str, Any]]:
    return {
        method: {
            "method": method,
            "checkpoints": shape,
            "checked": "tiny-llama",
            "without": ["mergekit"] if method == "rankmean" else [],
        }
        for method in methods
    }


_KERNELS = 24
"""The query and value kernels of a BERT-base."""
_SHAPES = {"MiniLM": "minilm", "BERT-base": "bert-base"}
_DECODERS = {"GPT-2 small": "gpt2", "stories260k": "stories260k"}
_MERGES: dict[str, Peer] = {
    "ours": Peer("python -m merge", "merge_command", options={"tool": "ours"}),
    "mergekit": Peer("mergekit", "merge_command", "mergekit", ("mergekit",), {"tool": "mergekit"}),
    "floor": Peer("read, hash, write and sync", "merge_floor"),
}

QUESTIONS: dict[str, Question] = {
    "train_step": Question(
        "Training step",
        _STEP
        + " KerasHub trains about 3.5 times as many numbers as PEFT's LoRA: a factor of its own for each head, and the biases "
        "of query and value.",
        _SIDES,
        {f"{title}, {batch} x 128": _train(shape, batch, 128) for title, shape in _SHAPES.items() for batch in (8, 32)},
        {"tiny": _tiny("tiny-bert")},
        metrics=("seconds", "peak_bytes"),
        training=True,
        minutes=35,
    ),
    "decoder_step": Question(
        "Training step of a decoder",
        _STEP,
        {name: side for name, side in _SIDES.items() if name != "keras"},
        {"SmolLM2-135M, 4 x 256": _train("smollm2-135m", 4, 256)},
        {"tiny": _tiny("tiny-llama")},
        metrics=("seconds", "peak_bytes"),
        training=True,
        minutes=8,
    ),
    "epoch": Question(
        "One pass over a data set, real lengths",
        "Seconds of a pass over the training data with real lengths, from the same pretrained weights; accuracy on the dev "
        "set after it: the mean of all rounds, the least and the most. The larger class alone gives 0.527 on RTE (277 "
        "examples) and 0.509 on SST-2 (872). "
        f"{_ALLOCATOR}, and with dynamic padding once more with these settings.",
        {
            "ours": Peer("DSEE, buckets of length", "ours_epoch", options={"memory": True}),
            "peft": Peer("PEFT LoRA, dynamic padding", "torch_epoch", "torch", PEFT, {"grouped": False}),
            "peft_memory": Peer(
                "PEFT LoRA, dynamic padding, our memory settings",
                "torch_epoch",
                "torch",
                PEFT,
                {"grouped": False, "memory": True},
            ),
            "peft_grouped": Peer("PEFT LoRA, grouped by length", "torch_epoch", "torch", PEFT, {"grouped": True}),
        },
        {"MiniLM, RTE": _run("rte", 0), "MiniLM, SST-2, 2,000 examples": _run("sst2", 2000)},
        {"tiny": _tiny_run()},
        scores=("accuracy",),
        minutes=20,
    ),
    "inference": Question(
        "Logits of a batch",
        "Seconds from token ids to logits, float32, full rows. Cut: half of the heads and neurons of each layer. "
        "torch.compile as it comes, and with freezing (`torch._inductor.config.freezing`), which folds the weights into the "
        f"program. {_ALLOCATOR}.",
        {
            "ours": Peer("dsee_jax", "ours_forward", options={"form": "plain", "memory": True}),
            "cut": Peer("dsee_jax, cut to half the FLOPs", "ours_forward", options={"form": "cut", "memory": True}),
            "stablehlo": Peer(
                "dsee_jax, StableHLO export", "ours_forward", options={"form": "stablehlo", "memory": True}
            ),
            "torch": Peer("PyTorch", "torch_forward", "torch", TORCH, {"form": "eager"}),
            "torch_compiled": Peer("PyTorch, torch.compile", "torch_forward", "torch", TORCH, {"form": "compiled"}),
            "torch_frozen": Peer(
                "PyTorch, torch.compile with freezing", "torch_forward", "torch", TORCH, {"form": "frozen"}
            ),
            "onnx": Peer("ONNX Runtime", "onnx_forward", "torch", (*TORCH, "onnxruntime", "onnxscript")),
        },
        {
            f"{title}, {batch} x {length}": _forward(shape, batch, length)
            for title, shape in _SHAPES.items()
            for batch in (1, 8, 32)
            for length in (16, 128)
        },
        {"tiny": _forward("tiny-bert", 2, 16, round=0.02)},
        ratios=(
            *(("ours", peer) for peer in ("torch", "torch_compiled", "torch_frozen", "onnx", "stablehlo")),
            *(("cut", other) for other in ("ours", "torch", "onnx")),
        ),
        minutes=40,
    ),
    "generation": Question(
        "New tokens",
        "Seconds of 64 new tokens after prompts of 32, float32; no text ends early. transformers compiles the step of a "
        f"static cache in greedy search alone. {_ALLOCATOR}, and with the default cache once more with these settings.",
        {
            "ours": Peer("dsee_jax.generate", "ours_generate", options={"memory": True}),
            "transformers": Peer("transformers", "torch_generate", "torch", TORCH, {"cache": ""}),
            "transformers_memory": Peer(
                "transformers, our memory settings",
                "torch_generate",
                "torch",
                TORCH,
                {"cache": "", "memory": True},
            ),
            "transformers_static": Peer(
                "transformers, static cache", "torch_generate", "torch", TORCH, {"cache": "static"}
            ),
        },
        {
            f"{title}, {batch} prompt{'s' * (batch > 1)}, {f'{beams} beams' if beams > 1 else 'greedy'}": _generate(
                shape, batch, beams
            )
            for title, shape in _DECODERS.items()
            for beams in (1, 4)
            for batch in (1, 8, 64)
        },
        {
            f"tiny, {title}": _generate("tiny-gpt2", 2, beams, length=8, new=4, round=0.05)
            for beams, title in ((1, "greedy"), (2, "2 beams"))
        },
        minutes=50,
    ),
    "grebsmo": Question(
        "Supports by GreBsmo",
        "Seconds for all query and value kernels of a BERT-base. The peer follows the paper and the description of the "
        f"authors' code; it takes one kernel after another: the seconds of one kernel, times {_KERNELS}. {_ALLOCATOR}.",
        {
            "ours": Peer(f"dsee_jax, {_KERNELS} kernels at once", "ours_grebsmo", options={"memory": True}),
            "authors": Peer("the authors' procedure, written anew", "torch_grebsmo", "torch", ("torch",)),
        },
        {
            f"{_KERNELS} kernels of 768 x 768": {
                "width": 768,
                "kernels": _KERNELS,
                "nonzeros": 64,
                "round": 1.0,
                "warmup": 2,
            }
        },
        {"tiny": {"width": 48, "kernels": 2, "nonzeros": 8, "round": 0.02, "warmup": 2}},
        minutes=2,
    ),
    "loading": Question(
        "Loading a checkpoint",
        "Seconds without imports, and by how much the peak memory of the process rises. transformers maps the file and copies "
        "nothing; each of our kernels is transposed, which is a copy.",
        {
            "ours": Peer("dsee_jax.load_pretrained", "ours_load"),
            "transformers": Peer("transformers", "torch_load", "torch", TORCH),
        },
        {
            "BERT-base, float32": {"shape": "bert-base", "dtype": "float32"},
            "Llama of 1.1 billion, bfloat16": {"shape": "llama-1.1b", "dtype": "bfloat16"},
        },
        {"tiny": {"shape": "tiny-bert", "dtype": "float32"}},
        metrics=("seconds", "raised_bytes"),
        fresh=True,
        minutes=5,
    ),
    "startup": Question(
        "From the command to the end of the first step",
        "Seconds since the start of the process. Every round is a new process. The cache is the compilation cache: empty, or "
        "filled by an earlier run. Up to its first step, train.py also chooses supports by GreBsmo, evaluates the dev set and "
        "writes a checkpoint; the script of PEFT does none of these.",
        {
            "ours": Peer("train.py, empty cache", "ours_start", options={"cache": "empty"}),
            "cached": Peer("train.py, filled cache", "ours_start", options={"cache": "filled"}),
            "peft": Peer("PEFT under Trainer", "torch_start", "torch", (*PEFT, "accelerate")),
        },
        {"MiniLM, SST-2, 2,000 examples": _run("sst2", 2000)},
        {"tiny": _tiny_run()},
        ratios=(("ours", "peft"), ("cached", "peft"), ("cached", "ours")),
        fresh=True,
        minutes=7,
    ),
    "import": Question(
        "Import",
        "Seconds in a new process, files in the page cache. `import dsee_jax` leaves JAX and Flax to the first use of a "
        "function; `dsee_jax, JAX and Flax` names `load_pretrained` too, which loads them.",
        {
            "ours": Peer("dsee_jax", "import_package", options={"packages": ["dsee_jax"]}),
            "loaded": Peer(
                "dsee_jax, JAX and Flax",
                "import_package",
                options={"packages": ["dsee_jax"], "attribute": "load_pretrained"},
            ),
            "peft": Peer("peft", "import_package", "torch", PEFT, {"packages": ["peft"]}),
            "transformers": Peer(
                "torch, transformers", "import_package", "torch", TORCH, {"packages": ["torch", "transformers"]}
            ),
            "keras": Peer(
                "keras_hub", "import_package", "keras", ("keras_hub", "tensorflow"), {"packages": ["keras_hub"]}
            ),
        },
        {"import": {}},
        {"import": {}},
        ratios=(
            ("loaded", "ours"),
            *((each, peer) for each in ("ours", "loaded") for peer in ("peft", "transformers", "keras")),
        ),
        fresh=True,
        minutes=2,
    ),
    "merging": Question(
        "Merging two models of 1.1 billion parameters, bfloat16",
        "Seconds until the output is on the disk, checksums of all inputs included; peak of anonymous memory. The floor reads "
        "and hashes the same inputs, and writes and syncs as many bytes. Our rounds find programs that an earlier process "
        "compiled.",
        _MERGES,
        _merges("llama-1.1b", "linear", "rankmean", "task_arithmetic", "slerp", "dare_ties", "ties"),
        _merges("tiny-llama-bfloat16", "linear", "rankmean", "ties"),
        metrics=("seconds", "peak_bytes"),
        fresh=True,
        tolerance=1e-7,
        packages=("dsee_jax", "merge"),
        minutes=35,
    ),
    "merging_large": Question(
        "Merging two models of 4.5 billion parameters, bfloat16",
        "As with 1.1 billion: the peak of memory must not grow with the model. Needs 36 GB of disk.",
        {name: side for name, side in _MERGES.items() if name != "mergekit"},
        _merges("llama-4.5b", "linear", "rankmean", "ties"),
        _merges("tiny-llama-bfloat16", "linear"),
        metrics=("seconds", "peak_bytes"),
        fresh=True,
        packages=("dsee_jax", "merge"),
        minutes=25,
    ),
}
"""By name: the questions of a machine without an accelerator."""


def _on_gpu(shape: str, batch: int, length: int) -> dict[str, Any]:
    decoder = not shape.startswith("bert")
    return _train(shape, batch, length, dtype="bfloat16", scan=decoder, round=1.0, warmup=4)


GPU: dict[str, Question] = {
    "gpu_step": Question(
        "Training step on a GPU",
        _STEP
        + " bfloat16; PEFT with SDPA, under torch.autocast, as by Trainer(bf16=True), since its updates are float32. GPT-2: "
        "query, key and value, which are one kernel in PEFT: rank 24 there. MFU: FLOPs of "
        "forward and backward of the frozen model over the rate of a product of 8192 x 8192 matrices on the same card.",
        {name: side for name, side in _SIDES.items() if name in ("ours", "peft", "peft_compiled")},
        {
            "BERT-base, 64 x 128": _on_gpu("bert-base", 64, 128),
            "Llama of 7 billion, 2 x 1024": _on_gpu("llama-7b", 2, 1024),
            "Llama of 1.1 billion, 8 x 1024": _on_gpu("llama-1.1b", 8, 1024),
            "BERT-large, 64 x 128": _on_gpu("bert-large", 64, 128),
            "GPT-2 medium, 8 x 1024": _on_gpu("gpt2-medium", 8, 1024),
        },
        {
            "tiny Llama": _tiny("tiny-llama-bfloat16", dtype="bfloat16", scan=True),
            "tiny BERT": _tiny("tiny-bert", dtype="bfloat16"),
            "tiny GPT-2": _tiny("tiny-gpt2", dtype="bfloat16", scan=True),
        },
        metrics=("seconds", "peak_bytes"),
        tolerance=5e-2,
        training=True,
        minutes=12,
    ),
}
"""By name: those of ``--gpu``."""
