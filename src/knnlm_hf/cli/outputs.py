"""What the commands print: one JSON object for machines, or a table."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table


def store_facts(store: Any) -> dict[str, Any]:
    """What `knnlm info` tells of a datastore."""
    from knnlm_hf import identity
    from knnlm_hf.index import built_indexes

    size = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
    indexes = built_indexes(store.path / "indexes")
    return {
        "store": str(store.path),
        "entries": len(store),
        "documents": store.documents,
        "layer": store.layer,
        "dim": store.dim,
        "dtype": str(store.dtype).removeprefix("torch."),
        "model": identity.name(store.manifest.model),
        "bytes": size,
        "indexes": [f"{found.factory} ({found.metric})" for _, found in indexes],
    }


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print named figures."""
    if as_json:
        # JSON has no infinity: a perplexity of ∞ is the string "inf".
        plain = {k: str(v) if v in (float("inf"),) else v for k, v in facts.items()}
        typer.echo(json.dumps(plain, default=str))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        table.add_row(name, f"{shown:,}" if isinstance(shown, int) else str(shown))
    Console().print(table)


def number(value: float | None) -> str:
    """A perplexity for a table: – where there is none, ∞ where it is infinite."""
    return "–" if value is None else "∞" if value == float("inf") else f"{value:.2f}"
