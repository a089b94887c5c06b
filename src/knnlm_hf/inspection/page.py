"""The page of a reading: one HTML file that loads nothing and trusts nothing of the texts in it.

All text is escaped, what the script needs is JSON without any `<`, and the page's own policy lets
no script run but ours, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from string import Template
from typing import Any

from knnlm_hf import __version__
from knnlm_hf.inspection.contexts import Context
from knnlm_hf.inspection.reading import Reading, Token, read
from knnlm_hf.inspection.words import (
    PHRASES,
    escape,
    level,
    number,
    percent,
    share,
    verdict,
    visible,
)
from knnlm_hf.modeling.explain import place_name

_HELPED, _DOCUMENTS, _LEAD = 12, 10, 8  # rows, rows, tokens before one in a list


def explanation_page(
    knn: Any,
    text_or_ids: Any,
    tokenizer: Any = None,
    *,
    top: int = 5,
    limit: int = 2048,
    window: int | None = None,
    stride: int | None = None,
    title: str = "A text, token by token",
) -> str:
    """A self-contained HTML page of a text: who predicted each token, and from where.

    Each token is coloured by log P_memory − log P_LM and shows, by pointer, touch or keyboard, the
    probabilities of model, memory and mixture, and its neighbours with weight, document and text.
    Also: perplexities, the tokens that the memory helped most, the documents that gave most. The
    page needs no network, and works in print, in the dark, and on a telephone.

    Args:
        knn: a `KNNLMForCausalLM` with a memory that has neighbours.
        text_or_ids: a text itself (not a path), or its token ids.
        tokenizer: default: the one kept in the datastore.
        top: neighbours per token, ≥ 1: so many of the nearest, and so many of the nearest that
            carry the token, per memory.
        limit: tokens shown, ≥ 2; of a longer text the beginning, and the page says so.
        window, stride: as of `score`: every figure is the one that `score` has.
        title: of the page.

    Raises:
        KNNLMError: a memory without neighbours, or no tokenizer.
        CorpusError: fewer than 2 tokens, or ids outside the vocabulary.
        ModelMismatchError: the datastore was read with another tokenizer.
        SettingError: top, limit, window or stride out of range.
    """
    reading = read(knn, text_or_ids, tokenizer, top=top, limit=limit, window=window, stride=stride)
    return render(reading, title)


def render(reading: Reading, title: str) -> str:
    """The HTML of a reading."""
    style, script = _file("page.css"), _file("page.js")
    helped = _helped(reading)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return Template(_file("page.html")).substitute(
        policy=policy,
        version=__version__,
        title=escape(title),
        style=style,
        script=script,
        figures=_figures(reading),
        legend=_legend(reading),
        text=_text(reading, {token.number: n for n, token in enumerate(helped, start=1)}),
        cut=_cut(reading),
        helped=_helped_list(reading, helped),
        documents=_documents(reading),
        settings=escape(_settings(reading)),
        data=_data(reading),
    )


def _file(name: str) -> str:
    return resources.files("knnlm_hf.inspection").joinpath(name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _figures(reading: Reading) -> str:
    rows = {
        "model alone": reading.base_perplexity,
        "memory alone": reading.memory_perplexity,
        "mixture": reading.perplexity,
        "better of the two per token": reading.oracle_perplexity,
    }
    cells = (f'<tr><th scope="row">{k}</th><td>{number(v)}</td></tr>' for k, v in rows.items())
    better = sum(token.ratio > 0 for token in reading.tokens)
    part = "the first " if reading.is_cut else ""
    return (
        f"<table><tbody>{''.join(cells)}</tbody></table>\n"
        f"<p>Of {part}{len(reading.tokens):,} predicted tokens the memory was likelier on "
        f"{better:,}. λ = {', '.join(f'{lmbda:.3g}' for lmbda in reading.lmbdas)}.</p>"
    )


def _legend(reading: Reading) -> str:
    counts = dict.fromkeys(PHRASES, 0) | {"first": 1}
    for token in reading.tokens:
        counts[level(token.ratio)] += 1
    items = (
        f'<li><span class="t {level}">{phrase}</span> {counts[level]:,}</li>'
        for level, phrase in PHRASES.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _text(reading: Reading, notes: dict[int, int]) -> str:
    spans = [_span(reading.first, "first", None)]
    spans += [
        _span(token.text, level(token.ratio), notes.get(token.number)) for token in reading.tokens
    ]
    return "".join(spans)


def _span(text: str, level: str, note: int | None) -> str:
    """A token; a space in front of its word stays outside, where it takes no colour."""
    word = text.lstrip(" ") or text
    kind = f"t {level} nl" if "\n" in text else f"t {level}"
    footnote = "" if note is None else f' data-note="{note}"'
    space = text[: len(text) - len(word)]
    return f'{space}<span class="{kind}"{footnote}>{escape(word)}</span>'


def _cut(reading: Reading) -> str:
    if not reading.is_cut:
        return ""
    shown = len(reading.tokens) + 1
    return (
        f"<p><strong>The text goes on: its first {shown:,} tokens are shown, and every figure "
        "is of these.</strong></p>"
    )


def _helped(reading: Reading) -> list[Token]:
    """The tokens that the memory helped most, most first."""
    gained = [token for token in reading.tokens if token.gain > 0]
    return sorted(gained, key=lambda token: -token.gain)[:_HELPED]


def _helped_list(reading: Reading, helped: list[Token]) -> str:
    if not helped:
        return ""
    texts = [reading.first, *(token.text for token in reading.tokens)]
    items = []
    for token in helped:
        lead = "".join(texts[max(0, token.number - _LEAD) : token.number])
        items.append(
            f"<li><b>“{escape(visible(token.text))}”</b> after “{escape(visible(lead))}”: "
            f"model {percent(token.lm)}, memory {percent(token.memory)}, "
            f"mixture {percent(token.mixture)}.{_source(reading, token)}</li>"
        )
    return (
        '<section aria-labelledby="helped"><h2 id="helped">Where the memory helped most</h2>\n'
        f'<ol class="helped">{"".join(items)}</ol></section>'
    )


def _source(reading: Reading, token: Token) -> str:
    """The nearest neighbour that carries the token."""
    if not token.carriers:
        return ""
    near = token.carriers[0]
    context = reading.contexts[near]
    where = f" {_document(reading, near.memory, near.document)}, neighbour {near.rank}:"
    return where + _quote(context) if context.text else where[:-1]


def _quote(context: Context) -> str:
    before, token, after = map(escape, context.text or ("", "", ""))
    return f'<span class="quote" dir="auto">{before}<b>{token}</b>{after}</span>'


def _document(reading: Reading, memory: int, document: int | None) -> str:
    return f"memory {memory + 1}, " * (len(reading.memories) > 1) + place_name(document)


def _documents(reading: Reading) -> str:
    rows = reading.documents()
    if not rows:
        return ""
    cells = "".join(
        f'<tr><th scope="row">{_document(reading, memory, document)}</th>'
        f"<td>{tokens:,}</td><td>{given:.2f}</td></tr>"
        for memory, document, tokens, given in rows[:_DOCUMENTS]
    )
    more = f" {len(rows) - _DOCUMENTS:,} more gave less." if len(rows) > _DOCUMENTS else ""
    return (
        '<section aria-labelledby="documents"><h2 id="documents">Documents that gave most</h2>\n'
        '<table><thead><tr><th scope="col"></th><th scope="col">tokens</th>'
        f'<th scope="col">share</th></tr></thead><tbody>{cells}</tbody></table>\n'
        "<p>Tokens that a document's entries carry, and the sum of its shares in them: the part of "
        f"the mixture's probability that comes from its neighbours shown here.{more}</p></section>"
    )


def _settings(reading: Reading) -> str:
    """What each memory is; no path, for a page goes to others."""
    found = []
    for memory, lmbda in zip(reading.memories, reading.lmbdas, strict=True):
        store = getattr(memory, "store", None)
        facts = [type(memory).__name__, f"layer {memory.layer}", f"λ {lmbda:.3g}"]
        if store is not None:
            facts.append(f"{len(store):,} entries")
        if hasattr(memory, "search"):
            facts += [f"k {memory.k:,}", f"t {memory.temperature:.3g}"]
        found.append(", ".join(facts))
    return f"Made with knnlm-hf {__version__}. Memory: {'; '.join(found)}."


def _data(reading: Reading) -> str:
    """What the script needs, as JSON that no HTML parser can misread."""
    data = {
        "memories": len(reading.memories),
        "note": "Shown are the nearest neighbours, and the nearest that carry the token.",
        "tokens": [None, *(_facts(reading, token) for token in reading.tokens)],
        "contexts": [(c.memory, c.document, c.token, c.text) for c in reading.contexts.rows],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _facts(reading: Reading, token: Token) -> dict[str, Any]:
    place = reading.contexts.number
    near = [(place(near), share(near.weight), near.rank) for near in token.neighbours]
    said = token.lm, token.memory, token.mixture
    facts: dict[str, Any] = {
        "id": token.id,
        "p": [percent(log_prob) for log_prob in said],
        "x": verdict(token),
        "g": (token.guess, percent(token.guess_log_prob)),
        "n": near,
    }
    if len(token.memories) > 1:
        facts["e"] = [percent(log_prob) for log_prob in token.memories]
    return facts
