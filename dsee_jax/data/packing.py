"""Several texts in one row, so that little of a batch is padding."""

import bisect

import numpy as np

from dsee_jax.data.tokens import Tokens


def pack(tokens: Tokens, length: int) -> Tokens:
    """Return tokens of rows of at most ``length``, each of one or more texts, numbered 1, 2, 3 ... in ``segments``.

    The longest text goes first, each into the fullest row that has room for it (best fit decreasing): no two rows would fit
    into one. Which texts share a row depends on their lengths and order alone, so epochs differ in the order of rows.
    A decoder reads ``segments`` as its attention mask: texts do not see each other and each begins at position 0.

    Args:
      tokens: texts to write, none longer than ``length``, not yet packed.
      length: tokens of a row.
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
