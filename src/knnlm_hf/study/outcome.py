"""What an experiment hands back: numbers, plots as numbers, and one honest sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from knnlm_hf.study.bootstrap import Comparison, Share

Verdict = Literal["holds", "does not hold", "not decidable at this size"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
UNDECIDED: Verdict = "not decidable at this size"


@dataclass(frozen=True)
class Series:
    """One line, or one group of bars, of a plot."""

    name: str
    x: list[Any]
    """Numbers, or the names of bars."""
    y: list[float]
    low: list[float] | None = None
    """Lower ends of the confidence intervals, where there are any."""
    high: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure as data: it is drawn when a report is made."""

    title: str
    x: str
    """Label of the horizontal axis."""
    y: str
    series: list[Series]
    kind: Literal["line", "bar"] = "line"
    log_x: bool = False
    level: float | None = None
    """A horizontal line: what to compare with."""
    level_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one experiment."""

    rows: list[dict[str, Any]]
    """One per setting; plain data. Tuned on valid, reported on test."""
    verdict: Verdict
    """Of the paper's finding, on this model and corpus."""
    sentence: str
    """Why: the numbers and intervals that say so."""
    plots: list[Plot] = field(default_factory=list)
    comparisons: Mapping[str, Comparison | Share] = field(default_factory=dict)
    """What decides the verdict, by what is compared with what: ratio, low, high, blocks."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; ∞ becomes the string "inf", as JSON has none."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def both(holds: bool, fails: bool) -> Verdict:
    """The verdict where `holds` and `fails` say what is certain; neither: not decidable."""
    return HOLDS if holds else FAILS if fails else UNDECIDED


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
