"""Puts the benchmarks' own figures into the pages, where they say `<!-- search figures -->`."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
MARK = "<!-- search figures -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARK, search_figures()) if MARK in markdown else markdown


def search_figures() -> str:
    """A table of every result of `benchmarks/search.py`."""
    tables = [
        _table(json.loads(path.read_text())) for path in sorted(RESULTS.glob("search_*.json"))
    ]
    return "\n\n".join(tables)


def _table(result: dict[str, Any]) -> str:
    lines = [
        "{entries:,} × {dim} keys, {metric}, k={k}, batches of {batch}; {device}, ".format(**result)
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + ":",
        "",
        "| index | bytes per entry | recall@k | queries/s | × exact | one query, ms | build, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        single = "" if row["single_ms"] is None else f"{row['single_ms'][1]:.2f}"
        lines.append(
            f"| `{row['spec']}` | {row['bytes_per_entry']:.0f} | {row['recall']:.3f} "
            f"| {row['queries_per_second'][1]:,.0f} | {row['ratio']:.1f} | {single} "
            f"| {row.get('build_seconds', '')} |"
        )
    return "\n".join(lines)
