"""Which points of a grid can be the best, told from a sample of the tokens: a race.

Of two settings that are compared on the same tokens the difference is known much better than the
perplexity of either, so a few thousand tokens tell most of a grid to be worse than its best point
by many times the error of that. Only the others need be looked at on all tokens. (Maron and Moore
1994, "Hoeffding races"; here with the error of the differences in place of Hoeffding's bound.)

Shape suffixes: P point of the grid, N token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TOKENS = 2048
_WORTH_IT = 5
"""So many times as many tokens as the sample's are needed for it to pay."""
_ERRORS = 6.0
"""A point that is as many standard errors behind is out. Rare tokens are what could deceive: some
three in 10,000 the sample may not have, and where they gain much it does not know."""
_TOO_CLOSE = 1e-3
"""Nats behind that never put a point out, for the sake of the rare tokens."""


def sample(count: int) -> Tensor | None:
    """2,048 or a few more of `count` tokens, in order: (n,) int64; None of fewer than 10,240.

    One of every few tokens that follow each other, drawn at random (but always the same ones), so
    that no period of the text falls in with them.
    """
    step = count // _TOKENS
    if step < _WORTH_IT:
        return None
    generator = torch.Generator().manual_seed(0)
    first_n = torch.arange(0, count - step + 1, step)
    return first_n + torch.randint(step, first_n.shape, generator=generator)


def contenders(log_likelihood_PN: Tensor) -> Tensor:
    """Which points may have the largest mean over all tokens, given N of those: (P,) bool.

    A point is out when its mean difference to the sample's best one is more than six times the
    standard error of that, and more than 0.001. Of one that is NaN nothing is known: it stays.

    Args:
        log_likelihood_PN: (P, N) of the same N tokens for each point.

    Example: a point that is always a little behind is out, one that is now and then ahead is not.

        >>> import torch
        >>> best = torch.zeros(100)
        >>> always, mixed = best - 0.01, best - 0.01
        >>> mixed[0] += 0.9
        >>> contenders(torch.stack([best, always, mixed]))
        tensor([ True, False,  True])
    """
    values_PN = log_likelihood_PN.double()
    best_N = values_PN[values_PN.mean(1).argmax()]
    behind_PN = best_N - values_PN
    error_P = behind_PN.std(1) / math.sqrt(behind_PN.shape[1])
    return ~(behind_PN.mean(1) > (_ERRORS * error_P).clamp(min=_TOO_CLOSE))
