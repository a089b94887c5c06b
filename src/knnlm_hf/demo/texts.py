"""Text that ships with every Python: docstrings to train on, the language reference as a domain."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
_SHORTEST = 40


def docstrings() -> list[str]:
    """The docstrings of the standard library, one text per module."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(library.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(library).parts):
            found = [text for text in _of_module(path) if len(text) >= _SHORTEST]
            if found:
                texts.append("\n\n".join(found) + "\n")
    return texts


def reference() -> list[str]:
    """The topics of Python's own language reference (`help()` shows them), one text each.

    The longest first, so that dealing them out gives parts of like size.
    """
    from pydoc_data.topics import topics

    texts = [topics[name].strip() + "\n" for name in sorted(topics)]
    return sorted(texts, key=len, reverse=True)


def split(texts: list[str], every: int = 6) -> tuple[list[str], list[str], list[str]]:
    """Deal texts into train, valid and test: of each six, four, one and one."""
    train = [text for i, text in enumerate(texts) if i % every not in (2, 5)]
    return train, texts[2::every], texts[5::every]


def _of_module(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text
