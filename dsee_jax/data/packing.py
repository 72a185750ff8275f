"""Packing: several texts per row, so that batches have little padding."""

import bisect

import numpy as np

from dsee_jax.data.tokens import Tokens


def pack(tokens: Tokens, length: int) -> Tokens:
    """Return rows of at most ``length`` tokens, each of one or more texts, numbered 1, 2, 3 ... in ``segments``.

    Best fit decreasing: texts are placed from the longest to the shortest, each into the fullest row with enough space, so
    that no two rows fit into one. The texts of a row depend on the lengths and the order of texts alone; epochs differ in
    the order of rows. A decoder reads ``segments`` as its attention mask: texts do not attend to each other, and each starts
    at position 0.

    Args:
      tokens: causal-lm texts, none longer than ``length``, not yet packed.
      length: the most tokens of a row.
    """
    lengths = tokens.lengths
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free, row), sorted
    for text in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[text])
        at = bisect.bisect_left(spaces, (size, -1))
        if at == len(spaces):
            rows.append([])
            spaces.append((length, len(rows) - 1))
        free, row = spaces.pop(at)
        rows[row].append(text)
        bisect.insort(spaces, (free - size, row))
    order = [text for row in rows for text in row]
    places = np.concatenate([np.arange(tokens.offsets[text], tokens.offsets[text + 1]) for text in order])
    numbers = np.concatenate([np.arange(1, len(row) + 1) for row in rows])
    totals = [int(lengths[row].sum()) for row in rows]
    return tokens._replace(
        input_ids=tokens.input_ids[places],
        token_type_ids=tokens.token_type_ids[places],
        offsets=np.concatenate([[0], np.cumsum(totals)]).astype(np.int64),
        labels=tokens.labels[places],
        weights=None if tokens.weights is None else tokens.weights[places],
        segments=np.repeat(numbers, lengths[order]).astype(np.int32),
    )
