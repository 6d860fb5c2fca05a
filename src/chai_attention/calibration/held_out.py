"""How much text is kept back to measure on."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from chai_attention.errors import CalibrationError, ChaiWarning

LEAST_WINDOWS = 6  # of text, to learn from and to measure on


def held_out_count(found: int, samples: int, asked: int, length: int) -> int:
    """How many of the windows that were found are kept back.

    As many as asked, if there is text for them and for the samples. Else a third at most, which
    a `ChaiWarning` says.

    Args:
        found: windows that the text has, of those asked for.
        samples: windows wanted to learn from.
        asked: further windows wanted to measure on.
        length: tokens per window.

    Raises:
        CalibrationError: too little text.
    """
    count = asked if found >= samples + asked else min(asked, found // 3)
    if found < LEAST_WINDOWS or count < 2:
        raise CalibrationError(
            f"measuring a loss needs at least {LEAST_WINDOWS} windows of text, 2 of them held out; "
            f"this is enough for {found}: give more text or a shorter length"
        )
    if found < samples + asked:
        warnings.warn(
            f"the text has {found} windows of {length} tokens, not {samples} and {asked}: "
            f"{found - count} are learnt from, and {count} measured on",
            ChaiWarning,
            stacklevel=3,
        )
    return count


def spread(windows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Split ``count`` evenly spread windows of ``[N, S]`` off: (what stays, what is kept back)."""
    back = torch.zeros(len(windows), dtype=torch.bool)
    back[[round((i + 0.5) * len(windows) / count - 0.5) for i in range(count)]] = True
    return windows[~back], windows[back]
