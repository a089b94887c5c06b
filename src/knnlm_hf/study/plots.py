"""Plots as numbers → SVG, for light and dark pages: lines and text take the page's colour."""

from __future__ import annotations

import io
import re
from typing import Any

from knnlm_hf.errors import KNNLMError

_INK = "#010203"  # drawn in this colour, then replaced by the page's own
_COLOURS = ("#3b82d6", "#d9822b", "#3f9e5a", "#c2528b", "#8a6fd1", "#7d7d7d")
_ALONE = (
    "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}"
    "text{font-family:sans-serif}</style>"
)


def draw(plot: dict[str, Any], name: str) -> str:
    """An `<svg>` element of a plot, as `outcome.Plot` describes it.

    Args:
        plot: its fields, as they were written to JSON.
        name: unique on the page.

    Raises:
        KNNLMError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KNNLMError(
            'a report needs matplotlib, which is not installed: pip install "knnlm-hf[study]"'
        ) from error
    options: Any = {
        "svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False,
        **{f"{part}.color": _INK for part in ("text", "xtick", "ytick")},
        "axes.labelcolor": _INK, "axes.edgecolor": _INK, "legend.labelcolor": _INK,
    }  # fmt: skip
    with mpl.rc_context(options):
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        axes: Any = figure.add_subplot()
        (_bars if plot["kind"] == "bar" else _lines)(axes, plot)
        if plot["level"] is not None:
            axes.axhline(plot["level"], color=_INK, linewidth=1, linestyle=":")
            where = {"xy": (1, plot["level"]), "xycoords": ("axes fraction", "data")}
            axes.annotate(plot["level_name"], ha="right", va="bottom", fontsize=8, **where)
        axes.set_xlabel(plot["x"])
        axes.set_ylabel(plot["y"])
        axes.grid(axis="y", color=_INK, alpha=0.12)
        axes.set_axisbelow(True)
        if len(plot["series"]) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=9)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue(), plot["title"])


def alone(svg: str) -> str:
    """The same as a file of its own, which has no page to take colours from."""
    return svg.replace("<defs>", f"{_ALONE}<defs>", 1)


def _lines(axes: Any, plot: dict[str, Any]) -> None:
    for colour, series in zip(_cycle(plot), plot["series"], strict=True):
        y = [float(value) for value in series["y"]]
        axes.plot(series["x"], y, color=colour, marker="o", markersize=3, label=series["name"])
        if series["low"] is not None:
            axes.fill_between(
                series["x"], series["low"], series["high"], color=colour, alpha=0.2, linewidth=0
            )
    if plot["log_x"]:
        axes.set_xscale("log")


def _bars(axes: Any, plot: dict[str, Any]) -> None:
    names = [str(name) for name in plot["series"][0]["x"]]
    width = 0.8 / len(plot["series"])
    values: list[float] = []
    for number, (colour, series) in enumerate(zip(_cycle(plot), plot["series"], strict=True)):
        at = [i + (number + 0.5) * width - 0.4 for i in range(len(names))]
        y = [float(value) for value in series["y"]]
        errors = None
        if series["low"] is not None:
            errors = [
                [value - low for value, low in zip(y, series["low"], strict=True)],
                [high - value for value, high in zip(y, series["high"], strict=True)],
            ]
        axes.bar(at, y, width * 0.92, color=colour, label=series["name"], yerr=errors, ecolor=_INK)
        values += y
    turned = {"rotation": 30, "ha": "right"} if sum(map(len, names)) > 50 else {}
    axes.set_xticks(range(len(names)), names, **turned)
    low, high = min([*values, plot["level"] or values[0]]), max([*values, plot["level"] or 0])
    if low > 0.5 * high:  # bars that differ by little: show where they differ, and say so
        axes.set_ylim(low - 0.3 * (high - low or high), high + 0.1 * (high - low or high))
        axes.annotate("axis cut", (0.01, 0.97), xycoords="axes fraction", fontsize=7, va="top")


def _cycle(plot: dict[str, Any]) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(len(plot["series"]))]


def _inline(svg: str, title: str) -> str:
    """From `<svg` on, as wide as the page, in the page's colour, with a name for screen readers."""
    from html import escape

    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).strip()
