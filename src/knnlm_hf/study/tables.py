"""Rows of results as tables: a few columns, and numbers that can be read."""

from __future__ import annotations

from typing import Any

_ORDER = (
    "setting", "kind", "group", "choice", "size", "layer", "metric", "tokens", "lmbda",
    "temperature", "k", "base_perplexity", "memory_perplexity", "oracle_perplexity", "perplexity",
    "against_base",
)  # fmt: skip
_HIDDEN = {"seed", "tuned_on", "valid_tokens", "t_over_scale"}
_LONGEST = 40
"""Rows shown; a longer table is in the JSON."""


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]], int]:
    """Head, body, and how many rows were left out.

    Columns that are empty everywhere are left out; longer tables are thinned evenly.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    names = [n for n in names if n not in _HIDDEN and any(row.get(n) is not None for row in rows)]
    names.sort(key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    step = -(-len(rows) // _LONGEST)
    shown = rows[::step] if step else rows
    head = [name.replace("_", " ").replace("lmbda", "λ") for name in names]
    return head, [[cell(row.get(name)) for name in names] for row in shown], len(rows) - len(shown)


def cell(value: Any) -> str:
    """One value, short: four digits, and an interval behind a ratio."""
    if value is None:
        return ""
    if isinstance(value, dict):
        if {"ratio", "low", "high"} <= value.keys():
            return f"{value['ratio']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        return ", ".join(f"{name} {cell(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "∞" if value == "inf" else str(value)
