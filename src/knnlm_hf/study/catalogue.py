"""Which experiments there are: the files of `study/experiments`, and what their docstrings say.

Nothing is imported until an experiment is run, so that listing is quick.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from knnlm_hf.errors import KNNLMError

FIELDS = ("Row", "Section", "Hypothesis", "Finding")
"""What the docstring of an experiment must say, each as "Name: text" at the start of a line."""
FOLDER = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Experiment:
    """One file of `study/experiments`, as its function's docstring describes it."""

    name: str
    """Of the file, and of the function in it."""
    title: str
    row: int
    """Which row of the paper's experiments: they run and are reported in this order."""
    section: str
    """Of the paper."""
    hypothesis: str
    """What the paper asks."""
    finding: str
    """What the paper found, with its numbers."""

    def function(self) -> Any:
        """The function `(study) -> Outcome`, imported now."""
        module = import_module(f"knnlm_hf.study.experiments.{self.name}")
        return getattr(module, self.name)

    def cost(self, study: Any) -> float | None:
        """Seconds that it may take by itself on two cores, by the file's own `cost(study)`."""
        module = import_module(f"knnlm_hf.study.experiments.{self.name}")
        estimate = getattr(module, "cost", None)
        return None if estimate is None else float(estimate(study))


@cache
def all_experiments() -> tuple[Experiment, ...]:
    """All experiments, in the order of the paper's rows."""
    found = [_read(path) for path in FOLDER.glob("*.py") if not path.stem.startswith("_")]
    return tuple(sorted(found, key=lambda experiment: (experiment.row, experiment.name)))


def code() -> str:
    """Sha-256 of all files of the study, as they are now: a row's helpers decide with it."""
    found = hashlib.sha256()
    for path in sorted(FOLDER.parent.rglob("*.py")):
        found.update(path.relative_to(FOLDER.parent).as_posix().encode() + b"\0")
        found.update(path.read_bytes() + b"\0")
    return found.hexdigest()


def chosen(names: Sequence[str] | None) -> list[Experiment]:
    """The experiments of these names, in order; all where none is named.

    Raises:
        KNNLMError: there is no experiment of a name.
    """
    known = {experiment.name: experiment for experiment in all_experiments()}
    for name in names or ():
        if name not in known:
            raise KNNLMError(f"no experiment {name!r}: choose among {', '.join(known)}")
    return [known[name] for name in known if not names or name in names]


def _read(path: Path) -> Experiment:
    """Parse the docstring of the function that is named as its file.

    Raises:
        KNNLMError: there is no such function, or its docstring lacks something.
    """
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == path.stem:
            said = parse(ast.get_docstring(node) or "", path.name)
            return Experiment(
                path.stem, said["title"], int(said["Row"]), said["Section"],
                said["Hypothesis"], said["Finding"],
            )  # fmt: skip
    raise KNNLMError(f"{path}: expected a function {path.stem}(study) in it")


def parse(docstring: str, name: str) -> dict[str, str]:
    """The title (first line) and the fields of an experiment's docstring, each in one line.

    Raises:
        KNNLMError: a field is missing.
    """
    title, _, body = docstring.strip().partition("\n")
    said = {"title": title.strip().rstrip(".")}
    starts = re.split(rf"^({'|'.join(FIELDS)}):", body, flags=re.MULTILINE)
    for field, text in zip(starts[1::2], starts[2::2], strict=True):
        said[field] = " ".join(text.split("\n\n")[0].split())
    lacking = [field for field in FIELDS if not said.get(field)]
    if not said["title"] or lacking:
        raise KNNLMError(f"{name}: its docstring lacks {', '.join(lacking) or 'a title'}")
    return said
