"""The pages under docs/ say what is: their code runs, their errors exist, every name is there."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import re
from pathlib import Path

import pages
import pytest
import standin
from fake_hub import FakeHub

import knnlm_hf

SOURCE = Path(knnlm_hf.__file__).parent
RUNNABLE = sorted(
    path.relative_to(pages.DOCS).as_posix()
    for path in pages.DOCS.rglob("*.md")
    if any(block.language == "python" for block in pages.blocks(path))
)
_SAYS = re.compile(r"Error$|(^|\.)warn(ing)?$")


def test_numbers_and_ellipses_of_expected_output() -> None:
    assert pages.matches("a 10.0 b", "a  11.9\nb\n")
    assert not pages.matches("a 10.0 b", "a 12.1 b")
    assert not pages.matches("a 10.0 b", "a 10.0 c")
    assert pages.matches("1,000 … (x)", "1,100 and more (x)")
    assert not pages.matches("lost", "")
    assert pages.matches("none inf", "none inf")
    assert not pages.matches("True", "False")


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_page_runs(
    name: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").symlink_to(standin.shared(tmp_path_factory))
    FakeHub(monkeypatch, tmp_path / "hub")
    assert pages.run(pages.DOCS / name)


@functools.cache
def said() -> list[str]:
    """Every message of an error or a warning in the source, `…` for what is put in."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            texts = []
            if isinstance(node, ast.Call) and _SAYS.search(ast.unparse(node.func)):
                texts = node.args[:1]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "message":
                texts = [node.value]
            found += [re.sub(r"%[sr]|[`\"]", "", text) for text in map(_text, texts) if text]
    return found


def _text(node: ast.expr) -> str | None:
    """A string, or an f-string with `…`; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def quoted_errors() -> list[str]:
    text = (pages.DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`", text, flags=re.M)


@pytest.mark.parametrize("error", quoted_errors())
def test_the_source_says_that(error: str) -> None:
    parts = [re.escape(part.strip()) for part in error.split("…") if part.strip()]
    wanted = re.compile(".*".join(parts), flags=re.S)
    assert any(wanted.search(text) for text in said()), error


def test_no_error_has_two_headings() -> None:
    assert len(set(quoted_errors())) == len(quoted_errors()) > 60


def test_every_public_name_has_its_reference() -> None:
    text = (pages.DOCS / "api.md").read_text(encoding="utf-8")
    shown = {line.rsplit(".", 1)[1] for line in re.findall(r"^::: ([\w.]+)$", text, flags=re.M)}
    assert public() - shown == set()


def public() -> set[str]:
    """What the package and its rooms say is theirs; the command line is no Python interface."""
    rooms = [module.name for module in pkgutil.iter_modules(knnlm_hf.__path__) if module.ispkg]
    names = set(knnlm_hf.__all__) - {"__version__"}
    for room in set(rooms) - {"cli"}:
        names |= set(getattr(importlib.import_module(f"knnlm_hf.{room}"), "__all__", ()))
    assert {"Datastore", "KNNMemory", "Study", "register"} < names
    return names


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (pages.DOCS.parent / "mkdocs.yml").read_text()))
    assert listed == {path.relative_to(pages.DOCS).as_posix() for path in pages.DOCS.rglob("*.md")}
