"""What the commands print: one JSON object for machines, or a table."""

from __future__ import annotations

import json
import math
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
        "removed_documents": len(store.removed_documents),
        "layer": store.layer,
        "dim": store.dim,
        "dtype": str(store.dtype).removeprefix("torch."),
        "model": identity.name(store.manifest.model),
        "bytes": size,
        "indexes": [f"{found.factory} ({found.metric})" for _, found in indexes],
    }


def head_facts(head: Any, source: str) -> dict[str, Any]:
    """What `knnlm info` tells of a trained head."""
    from knnlm_hf import identity

    trained = head.trained
    learned = {} if trained is None else {
        "entries": trained.entries, "epochs": trained.epochs,
        "held_out_loss": trained.held_out_loss,
        "held_out_perplexity": math.exp(min(trained.held_out_loss, 700.0)),
        "datastore": trained.store[:16],
    }  # fmt: skip
    return {
        "head": source,
        **head.settings(),
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "dtype": str(head.dtype).removeprefix("torch."),
        "model": "not recorded" if head.origin is None else identity.name(head.origin),
        **learned,
    }


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print named figures."""
    if as_json:
        typer.echo(json.dumps(_plain(facts), default=str))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        table.add_row(name, f"{shown:,}" if isinstance(shown, int) else str(shown))
    Console().print(table)


def _plain(value: Any) -> Any:
    """JSON has no infinity: a perplexity of ∞ is the string "inf"."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def number(value: float | None) -> str:
    """A perplexity for a table: – where there is none, ∞ where it is infinite."""
    return "–" if value is None else "∞" if value == float("inf") else f"{value:.2f}"
