"""Pages of documentation, run as they are printed.

The fenced blocks of a page that has Python are taken in order, in one folder and one namespace:

    ```python   is executed
    ```bash     its `knnlm …` lines go to the command line; its other lines are for people
    ```text     directly after one of these is what that must have printed

In expected output `…` stands for anything, and a number for any within 20 % of it or 0.02: other
machines round otherwise, other Pythons carry another text. A line `--8<-- "file"` is that file of
docs/, as the site's own snippets are.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).parent.parent / "docs"
_FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", flags=re.M | re.S)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_RELATIVE, _ABSOLUTE = 0.2, 0.02


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    code: str
    line: int
    """Of the page, counted from 1, where its code begins."""


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        indent, language, code = found.groups()
        code = re.sub(rf"^{indent}", "", code, flags=re.M)
        yield Block(language, _included(code), text[: found.start(3)].count("\n") + 1)


def run(path: Path, namespace: dict[str, Any] | None = None) -> int:
    """Run a page in the current folder; return how many of its blocks did something."""
    namespace = {"__name__": "__page__"} if namespace is None else namespace
    printed, count = None, 0
    for block in blocks(path):
        place = f"{path.name}:{block.line}"
        if block.language == "python":
            printed = _execute(block, place, namespace)
            count += 1
        elif block.language == "bash":
            printed = _commands(block.code, place)
            count += 1
        elif block.language == "text" and printed is not None:
            assert matches(block.code, printed), (
                f"{place}: the page says\n{block.code}\nbut it printed\n{printed}"
            )
            printed = None
        else:
            printed = None
    return count


def matches(expected: str, printed: str) -> bool:
    """Whether `printed` is what a page expects, up to `…`, numbers and white space."""
    parts = [_pattern(part) for part in expected.strip().split("…")]
    found = re.fullmatch("(?:.*?)".join(parts), printed.strip(), flags=re.S)
    if found is None:
        return False
    wanted = _NUMBER.findall(expected.strip())
    return all(_near(a, b) for a, b in zip(wanted, found.groups(), strict=True))


def _pattern(text: str) -> str:
    """A regular expression of a text: its numbers are groups, its white space any."""
    pieces, at = [], 0
    for number in _NUMBER.finditer(text):
        pieces += [_words(text[at : number.start()]), f"({_NUMBER.pattern})"]
        at = number.end()
    return "".join([*pieces, _words(text[at:])])


def _words(text: str) -> str:
    return re.sub(r"(?:\\?\s)+", r"\\s+", re.escape(text))


def _near(a: str, b: str) -> bool:
    x, y = float(a.replace(",", "")), float(b.replace(",", ""))
    return abs(x - y) <= max(_ABSOLUTE, _RELATIVE * abs(x))


def _execute(block: Block, place: str, namespace: dict[str, Any]) -> str:
    out = io.StringIO()
    # Empty lines in front: a traceback then names the page's own line.
    code = compile("\n" * (block.line - 1) + block.code, place, "exec")
    with redirect_stdout(out):
        exec(code, namespace)
    return out.getvalue()


def _commands(script: str, place: str) -> str:
    from typer.testing import CliRunner

    from knnlm_hf.cli import app

    printed = ""
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["knnlm"]:
            result = CliRunner().invoke(app, words[1:], env={"COLUMNS": "100"})
            assert result.exit_code == 0, f"{place}: {line}\n{result.output}{result.exception!r}"
            printed += result.stdout
    return printed


def _included(code: str) -> str:
    return re.sub(
        r'^--8<-- "(.+)"$', lambda found: (DOCS / found[1]).read_text().rstrip(), code, flags=re.M
    )
