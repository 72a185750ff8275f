"""Tiny files in the layouts of the nine GLUE tasks."""

import pathlib

import numpy as np

import tiny
from dsee_jax.data import glue

FILES = {
    "cola": (None, ["gj04\t1\t\tIt rains.", 'bc01\t0\t*\tRains "it.'], ["It rains.", 'Rains "it.'], None, [1, 0]),
    "sst2": ("sentence\tlabel", ['a "gem \t1', "dull\t0"], ['a "gem ', "dull"], None, [1, 0]),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t1\t2\t"So," he said.\t"So', "0\t3\t4\tYes.\tNo."],
        ['"So," he said.', "Yes."],
        ['"So', "No."],
        [1, 0],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tg\tf\t2012\t1\tn\tn\tA plane.\tA jet.\t4.750", "1\tg\tf\t2012\t1\tn\tn\tA cat.\tTwo.\t0.000"],
        ["A plane.", "A cat."],
        ["A jet.", "Two."],
        [4.75, 0.0],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["0\t1\t2\tWho?\tWhich one?\t1", "1\t3\t4\tWhy?\tHow?\t0"],
        ["Who?", "Why?"],
        ["Which one?", "How?"],
        [1, 0],
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label",
        ["0\tHe ran.\tHe moved.\tneutral\tentailment", "1\tHe ran.\tHe sat.\tneutral\tcontradiction"],
        ["He ran.", "He ran."],
        ["He moved.", "He sat."],
        [0, 2],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\tWho?\tIt was me.\tentailment", "1\tWhere?\tMaybe.\tnot_entailment"],
        ["Who?", "Where?"],
        ["It was me.", "Maybe."],
        [0, 1],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tIt rained.\tIt was wet.\tentailment", "1\tNo\u2028rain.\tDry.\tnot_entailment"],
        ["It rained.", "No\u2028rain."],
        ["It was wet.", "Dry."],
        [0, 1],
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tIt fell.\tThe cup fell.\t1", "1\tIt fell.\tThe sky fell.\t0"],
        ["It fell.", "It fell."],
        ["The cup fell.", "The sky fell."],
        [1, 0],
    ),
}
"""Per task: header line (None: no header), two rows, and the expected texts, pairs and labels."""

NAMES = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "stsb": "STS-B", "qqp": "QQP", "mnli": "MNLI", "qnli": "QNLI"}
NAMES |= {"rte": "RTE", "wnli": "WNLI"}
"""The folders of the tasks."""


def write(folder, task, rows=None, splits=("train", "dev", "dev_matched", "dev_mismatched"), header=""):
    """Write files of a task, by default the rows of `FILES` below their header; MRPC starts with a byte-order mark."""
    own, lines = FILES[task][:2]
    header = header or own
    content = "\n".join(([] if header is None else [header]) + (lines if rows is None else rows)) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"{split}.tsv").write_bytes((b"\xef\xbb\xbf" if task == "mrpc" else b"") + content.encode())


_PARSED = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
)
HEADERS = {
    ("mnli", "train"): f"{_PARSED}\tsentence1\tsentence2\tlabel1\tgold_label",
    ("mnli", "dev"): f"{_PARSED}\tsentence1\tsentence2\tlabel1\tlabel2\tlabel3\tlabel4\tlabel5\tgold_label",
}
"""The header lines of published files that `FILES` has in short."""


def published(folder: pathlib.Path, task: str, *, train: int, dev: int) -> None:
    """Write all files of a task as they are published, with sentences of `tiny.WORDS`; those of the test set have no labels.

    The labels take turns, and the first sentence begins with a word for its label.
    """
    layout, place = glue.LAYOUTS[task], folder / NAMES[task]
    generator, names = np.random.default_rng(0), layout.values or ("0.000", "1.250", "2.500", "5.000")
    for split, count in {"train": train, **dict.fromkeys(layout.dev, dev)}.items():
        header = HEADERS.get((task, split.partition("_")[0]), FILES[task][0])
        columns = layout.columns or tuple(str(header).split("\t"))
        rows = []
        for number in range(count):
            texts = [" ".join(generator.choice(tiny.WORDS[4:], 4)) for _ in range(2)]
            cells = {layout.text: f"{tiny.WORDS[number % len(names)]} {texts[0]}", layout.pair: texts[1]}
            rows.append(
                "\t".join((cells | {layout.label: names[number % len(names)]}).get(each, "0") for each in columns)
            )
        write(place, task, rows, [split], header)
    unlabelled = [name for name in ("index", layout.text, layout.pair) if name]
    for split in layout.dev:
        lines = ["\t".join(unlabelled), "\t".join("0" for _ in unlabelled)]
        (place / f"{split.replace('dev', 'test')}.tsv").write_text("\n".join(lines) + "\n")
