"""Figures and texts as the page words them."""

from __future__ import annotations

import html
import math

from knnlm_hf.inspection.pieces import shown
from knnlm_hf.inspection.reading import Token

_STEPS = 1.25, 3.0, 10.0  # how many times likelier each level begins
PHRASES = {
    "m3": "model over 10 times likelier",
    "m2": "model 3 to 10 times likelier",
    "m1": "model 1.25 to 3 times likelier",
    "even": "both about alike",
    "k1": "memory 1.25 to 3 times likelier",
    "k2": "memory 3 to 10 times likelier",
    "k3": "memory over 10 times likelier",
    "first": "the first token, which nothing predicts",
}


def escape(text: str) -> str:
    """Text for between tags or in a quoted attribute; a parser would change a bare \\r."""
    return html.escape(shown(text)).replace("\r", "&#13;")


def level(ratio: float) -> str:
    """The class of a token: who was likelier, and how much."""
    step = sum(abs(ratio) >= math.log(times) for times in _STEPS)
    return f"{'k' if ratio > 0 else 'm'}{step}" if step else "even"


def verdict(token: Token) -> str:
    """A sentence on who was likelier."""
    if token.memory == -math.inf:
        return "The memory gave it no probability."
    if level(token.ratio) == "even":
        return "Both gave it about the same."
    times = math.exp(min(abs(token.ratio), 100.0))
    many = f"{times:.2g}" if times < 99.5 else f"{times:,.0f}" if times < 1000 else "over 1,000"
    better, worse = ("memory", "model") if token.ratio > 0 else ("model", "memory")
    return f"The {better} gave it {many} times the {worse}'s probability."


def visible(text: str) -> str:
    """A token or a few in a sentence."""
    return text.replace("\r\n", "↵").replace("\n", "↵").strip(" ") or "␣"


def percent(log_prob: float) -> str:
    """A log-probability in nats, as a share."""
    return share(math.exp(log_prob))


def share(probability: float) -> str:
    """A probability or weight in percent, with three digits."""
    if 0 < probability < 1e-5:
        return "< 0.001\u00a0%"
    return f"{100 * probability:.3g}\u00a0%"


def number(value: float) -> str:
    """A perplexity."""
    return "∞" if value == math.inf else f"{value:,.2f}"
