"""When a finding is certain: of "no gain", as many of the paper's are, and of several clauses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from knnlm_hf.study.bootstrap import Comparison, Share
from knnlm_hf.study.outcome import FAILS, HOLDS, UNDECIDED, Verdict, both

NOTABLE = 0.995
"""A gain counts from half a percent of the perplexity."""
FAR = 0.95
"""Far better is a gain of 5 % of the perplexity or more."""
ABOUT = 0.1
"""About half is 50 % give or take so much."""


@dataclass(frozen=True)
class Clause:
    """One of the things that a finding says, and what is certain of it: neither, if nothing is."""

    text: str
    holds: bool
    fails: bool

    def tried(self, fair: bool) -> Clause:
        """The same; that it fails says nothing where it had no fair chance."""
        return replace(self, fails=self.fails and fair)


def below(text: str, found: Comparison | Share, threshold: float = NOTABLE) -> Clause:
    """Holds where the interval lies below the threshold, fails where it lies above."""
    return Clause(
        text, found.certain and found.high < threshold, found.certain and found.low > threshold
    )


def within(text: str, found: Comparison | Share, least: float, most: float) -> Clause:
    """Holds where the whole interval lies within two bounds, fails where all of it lies outside."""
    is_outside = found.high < least or found.low > most
    return Clause(
        text, found.certain and least <= found.low and found.high <= most,
        found.certain and is_outside,
    )  # fmt: skip


def about_half(text: str, found: Share) -> Clause:
    """Of "about half of the gain"."""
    return within(text, found, 0.5 - ABOUT, 0.5 + ABOUT)


def every(text: str, clauses: Sequence[Clause]) -> Clause:
    """Holds where all do, fails where one does."""
    return Clause(text, all(one.holds for one in clauses), any(one.fails for one in clauses))


def judged(clauses: Sequence[Clause]) -> tuple[Verdict, str]:
    """The verdict of a finding by its clauses, and a sentence's end that names those against it."""
    whole = every("", clauses)
    failing = [one.text for one in clauses if one.fails]
    open_ones = [one.text for one in clauses if not one.fails and not one.holds]
    said = [f"; not so: {'; '.join(failing)}"] if failing else []
    said += [f"; not certain: {'; '.join(open_ones)}"] if open_ones else []
    return both(whole.holds, whole.fails), "".join(said)


def no_gain(gain: Comparison, *, fair: bool = True) -> Verdict:
    """Of "no gain": holds where less than half a percent is certain, fails where more is.

    Args:
        gain: the setting that might help, against the one without.
        fair: whether the setting had its chance; without, that it brings nothing says nothing.
    """
    if gain.high < NOTABLE:
        return FAILS
    return HOLDS if fair and gain.low > NOTABLE else UNDECIDED
