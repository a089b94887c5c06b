"""When a finding of "no gain" is certain; many of the paper's findings are of that kind."""

from __future__ import annotations

from knnlm_hf.study.bootstrap import Comparison
from knnlm_hf.study.outcome import FAILS, HOLDS, UNDECIDED, Verdict

NOTABLE = 0.995
"""A gain counts from half a percent of the perplexity."""


def no_gain(gain: Comparison, *, fair: bool = True) -> Verdict:
    """Of "no gain": holds where less than half a percent is certain, fails where more is.

    Args:
        gain: the setting that might help, against the one without.
        fair: whether the setting had its chance; without, that it brings nothing says nothing.
    """
    if gain.high < NOTABLE:
        return FAILS
    return HOLDS if fair and gain.low > NOTABLE else UNDECIDED
