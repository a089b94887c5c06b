"""Results → one HTML page without scripts, and its twin in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from knnlm_hf.errors import KNNLMError
from knnlm_hf.folders import filled_at_once
from knnlm_hf.study import plots
from knnlm_hf.study.catalogue import all_experiments
from knnlm_hf.study.runner import RESULTS
from knnlm_hf.study.tables import cell, table
from knnlm_hf.study.workspace import read_json

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --soft: #66666e; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17171a; --soft: #a0a0a8; --line: #3a3a40; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
a { color: inherit; } .soft, figcaption, dt { color: var(--soft); font-size: .9rem; }
dd { margin: 0 0 .6rem; } figure { margin: 1.2rem 0; } svg { width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; } .all td { white-space: normal; }
.verdict { font-weight: 600; } .holds { color: #2f8f4e; } .does { color: #c9503c; }
.not { color: #a8791f; } summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def report(folder: str | Path) -> Path:
    """Write `report/index.html`, `report/README.md` and its plots from the results in a folder.

    Nothing is computed: it takes seconds, and can be made while a study is running. Results of
    another model or other texts than the last run's are left out, and named as left out.

    Returns:
        the path of the HTML page.

    Raises:
        KNNLMError: there are no results.
    """
    folder = Path(folder).expanduser()
    facts = read_json(folder / RESULTS / "study.json")
    read = [read_json(folder / RESULTS / f"{e.name}.json") for e in all_experiments()]
    whole = [result for result in read if _has(result, _SHOWN)]
    if not whole or not _has(facts, _FACTS):
        raise KNNLMError(
            f"{folder}: no results there: run `knnlm study run … --out {folder}` first"
        )
    results = [result for result in whole if result.get("of") == facts.get("of")]
    facts["left out"] = [result["row"] for result in whole if result not in results]
    drawings = {
        (result["experiment"], number): plots.draw(plot, f"{result['experiment']}-{number}")
        for result in results
        for number, plot in enumerate(result["plots"], start=1)
    }
    target = folder / "report"
    with filled_at_once(target) as page:
        (page / "plots").mkdir()
        for (name, number), svg in drawings.items():
            (page / "plots" / f"{name}-{number}.svg").write_text(plots.alone(svg), encoding="utf-8")
        (page / "README.md").write_text(_markdown(facts, results), encoding="utf-8")
        (page / "index.html").write_text(_html(facts, results, drawings), encoding="utf-8")
    return target / "index.html"


def _has(data: Any, names: set[str]) -> bool:
    return isinstance(data, dict) and names <= data.keys()


_SHOWN = {
    "experiment", "title", "row", "section", "hypothesis", "finding", "verdict", "sentence", "rows",
    "plots", "seconds",
}  # fmt: skip
_FACTS = {
    "model", "architecture", "parameters", "vocabulary", "window", "stride", "tokens", "machine",
}  # fmt: skip


def _about(facts: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, str]:
    """What was studied, with what, as names and values."""
    about = {
        "model": f"{facts['model']} ({facts['architecture']}, {facts['parameters']:,} parameters, "
        f"vocabulary {facts['vocabulary']:,}, window {facts['window']}, stride {facts['stride']})",
        "tokens": ", ".join(f"{split} {count:,}" for split, count in facts["tokens"].items()),
        "machine": facts["machine"],
    }
    if facts["left out"]:
        others = ", ".join(map(str, facts["left out"]))
        about["left out"] = (
            f"results of another model or other texts, rows {others}: run these again"
        )
    for name, shown in _SHARED.items():
        found = {r["row"]: shown(r[name]) for r in results if r.get(name)}
        for value in dict.fromkeys(found.values()):
            rows = [str(row) for row, other in found.items() if other == value]
            these = "row" if len(rows) == 1 else "rows"
            is_all = len(rows) == len(results)
            about[name if is_all else f"{name}, {these} {', '.join(rows)}"] = value
    return about


_SHARED: dict[str, Callable[[Any], str]] = {
    "settings": lambda found: ", ".join(f"{k} {cell(v) or 'all'}" for k, v in found.items()),
    "versions": lambda found: ", ".join(f"{k} {v}" for k, v in found.items()),
    "command": str,
}
"""What each result has of its own, though it is mostly one for all."""


_TITLE = "Why does a nearest-neighbour language model work here?"
_METHOD = (
    "Every finding of Why do Nearest Neighbor Language Models Work? (Xu, Alon and Neubig, 2023, "
    "arXiv 2301.02828), tried on this model and corpus. Settings are tuned on valid and reported "
    "on test. A ratio is the perplexity of one setting as a multiple of another's on the same "
    "tokens; the brackets hold its 95 % interval, from a paired bootstrap over documents or runs "
    "of tokens. The paper's figures are of its own model and text: compare directions and ratios."
)


def _html(
    facts: dict[str, Any], results: list[dict[str, Any]], drawings: dict[tuple[str, int], str]
) -> str:
    about = "".join(
        f"<dt>{name}</dt><dd>{escape(v)}</dd>" for name, v in _about(facts, results).items()
    )
    summary = "".join(
        f'<tr><td>{r["row"]}</td><td><a href="#{r["experiment"]}">{escape(r["title"])}</a></td>'
        f"<td>{_verdict(r)}</td></tr>"
        for r in results
    )
    sections = "".join(_section(result, drawings) for result in results)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_TITLE}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{_TITLE}</h1><p>{escape(_METHOD)}</p>"
        f'<table class="all"><tr><th></th><th>question</th><th>the paper’s finding</th></tr>'
        f"{summary}</table>{sections}<h2>What was studied</h2><dl>{about}</dl></body></html>\n"
    )


def _verdict(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    return f'<span class="verdict {verdict.split()[0]}">{verdict}</span>'


def _section(result: dict[str, Any], drawings: dict[tuple[str, int], str]) -> str:
    name = result["experiment"]
    figures = "".join(
        f"<figure>{drawings[name, i]}<figcaption>{escape(plot['title'])}</figcaption></figure>"
        for i, plot in enumerate(result["plots"], start=1)
    )
    head, body, left = table(result["rows"])
    cells = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in body)
    heads = "".join(f"<th>{escape(h)}</th>" for h in head)
    return (
        f'<h2 id="{name}">{result["row"]}. {escape(result["title"])}</h2>'
        f"<dl><dt>asked (paper, section {escape(result['section'])})</dt>"
        f"<dd>{escape(result['hypothesis'])}</dd>"
        f"<dt>found by the paper</dt><dd>{escape(result['finding'])}</dd>"
        f"<dt>measured here</dt><dd>{_verdict(result)}: {escape(result['sentence'])}</dd></dl>"
        f"{figures}<details><summary>{len(result['rows'])} rows{_thinned(left, name)}, "
        f"{result['seconds']:.0f} s</summary>"
        f'<div class="wide"><table><tr>{heads}</tr>{cells}</table></div></details>'
    )


def _thinned(left: int, name: str) -> str:
    return f" ({left} not shown: {RESULTS}/{name}.json)" if left else ""


def _markdown(facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    lines = [
        f"# {_TITLE}",
        "",
        _METHOD,
        "",
        "| | question | the paper's finding |",
        "|---|---|---|",
    ]
    lines += [f"| {r['row']} | {r['title']} | **{r['verdict']}** |" for r in results]
    for result in results:
        name = result["experiment"]
        lines += [
            "", f"## {result['row']}. {result['title']}", "",
            f"*Asked (paper, section {result['section']}):* {result['hypothesis']}", "",
            f"*Found by the paper:* {result['finding']}", "",
            f"*Measured here:* **{result['verdict']}**: {result['sentence']}", "",
        ]  # fmt: skip
        for i, plot in enumerate(result["plots"], start=1):
            lines += [f"![{plot['title']}](plots/{name}-{i}.svg)", ""]
        head, body, left = table(result["rows"])
        lines += [
            f"<details><summary>{len(result['rows'])} rows{_thinned(left, name)}, "
            f"{result['seconds']:.0f} s</summary>"
        ]
        lines += ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        lines += [f"| {' | '.join(c.replace('|', chr(92) + '|') for c in row)} |" for row in body]
        lines += ["", "</details>"]
    lines += ["", "## What was studied", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in _about(facts, results).items()]
    return "\n".join(lines) + "\n"
