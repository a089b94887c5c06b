"""The learning rate over a training: a short rise, then half a cosine."""

from __future__ import annotations

import math


def cosine_rate(done: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate in step `done` of `steps`: it rises, then falls to 0.

    Args:
        done: steps before this one.
        steps: in all.
        warmup: share of the steps in which it rises, 0 ≤ warmup < 1.
    """
    rising = max(1, int(steps * warmup))
    if done < rising:
        return (done + 1) / rising
    share = (done - rising) / max(1, steps - rising)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
