"""A table of where tokens came from, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from knnlm_hf.modeling import Explanation
from knnlm_hf.modeling.explain import place_name


def sources(explanations: Sequence[Explanation], top: int = 2) -> Table:
    """One row per token: who gave it how much, and the nearest entries that carry it."""
    table = Table("token", "model", "memory", "nearest entries with that token", show_lines=False)
    for position in explanations:
        carrying = [n for n in position.neighbours if n.token == position.predicted][:top]
        lines = [
            f"{place_name(n.document)}: …{escape(_one_line(n.context or ''))}…" for n in carrying
        ]
        table.add_row(
            escape(repr(position.predicted_text or position.predicted)),
            _share(position.lm_log_prob),
            _shares(position.memory_log_prob),
            "\n".join(lines) or "(none among those shown)",
        )
    return table


def _shares(log_probs: float | tuple[float, ...]) -> str:
    """Of one memory or of several."""
    return " + ".join(map(_share, log_probs if isinstance(log_probs, tuple) else (log_probs,)))


def _share(log_prob: float) -> str:
    return f"{100 * math.exp(log_prob):.1f} %"


def _one_line(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[-width:]
