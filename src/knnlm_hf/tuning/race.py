"""Which points of a grid can be the best, told from a sample of the tokens: a race.

Of two settings that are compared on the same tokens the difference is known much better than the
perplexity of either, so a few thousand tokens tell most of a grid to be worse than its best point
by many times the error of that. Only the others need be looked at on all tokens. (Maron and Moore
1994, "Hoeffding races"; here with the error of the differences in place of Hoeffding's bound.)

Shape suffixes: P point of the grid, N token.
"""

from __future__ import annotations

import math

from torch import Tensor

_TOKENS = 2048
_WORTH_IT = 4
"""So many times as many tokens as the sample's are needed for it to pay."""
_ERRORS = 6.0
"""A point this many standard errors behind is out: it would be ahead once in 10⁹ times."""
_TOO_CLOSE = 1e-3
"""Nats behind that never put a point out: what is rare in the text may not be in the sample."""


def sample(count: int) -> slice | None:
    """Some 2,048 of `count` tokens, evenly spread; None where there are not many more."""
    # Odd, so that it does not fall in with windows and records of 2^n tokens.
    step = count // _TOKENS // 2 * 2 + 1
    return slice(0, None, step) if step > _WORTH_IT else None


def contenders(log_likelihood_PN: Tensor) -> Tensor:
    """Which points may have the largest mean over all tokens, given N of those: (P,) bool.

    A point is out when its mean difference to the sample's best one is more than six times the
    standard error of that.

    Args:
        log_likelihood_PN: (P, N) of the same N tokens for each point.

    Example: a point that is always a little behind is out, one that is now and then ahead is not.

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
    return behind_PN.mean(1) <= (_ERRORS * error_P).clamp(min=_TOO_CLOSE)
