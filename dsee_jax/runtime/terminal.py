"""Whether stderr is a terminal that draws progress bars; elsewhere the output of a command is plain lines."""

import os
import sys

_NO_CURSOR = ("dumb", "unknown")
"""The values of ``TERM`` for terminals that cannot move the cursor."""

_OFF = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
"""The variables that switch the bars of huggingface_hub, and of every other user of tqdm, off."""


def draws_bars() -> bool:
    """Return whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in _NO_CURSOR


def silence_bars() -> None:
    """Switch the bars of other packages off where none can be drawn; call it before they are imported."""
    if not draws_bars():
        os.environ.update(dict.fromkeys(_OFF, "1"))
