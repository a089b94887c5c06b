"""One version, declared ranges that are tested, extras that name each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import knnlm_hf

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, Version]:
    """The versions of a constraints file, by normal name."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        normal(r.name): Version(next(iter(r.specifier)).version.split("+")[0]) for r in requirements
    }


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [r for r in map(Requirement, lines) if normal(r.name) != "knnlm-hf"]


def test_the_version_has_one_source() -> None:
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", knnlm_hf.__version__)


def test_the_changelog_tells_of_it() -> None:
    """Its newest entry is this version's, or is not released."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.findall(r"^## \[?([^\]\s]+)", text, flags=re.M)[0]
    assert newest in ("Unreleased", knnlm_hf.__version__)


@pytest.mark.parametrize("requirement", declared("cpu", "study"), ids=lambda r: r.name)
def test_the_oldest_declared_is_the_oldest_tested(requirement: Requirement) -> None:
    lowest = [s.version for s in requirement.specifier if s.operator == ">="]
    assert pins("constraints-oldest.txt")[normal(requirement.name)] == Version(lowest[0])


@pytest.mark.parametrize("requirement", declared("cpu", "study", "test", "docs", "dev"), ids=str)
def test_the_pinned_environment_is_within_the_ranges(requirement: Requirement) -> None:
    pinned = pins("constraints-dev.txt")[normal(requirement.name)]
    assert requirement.specifier.contains(pinned, prereleases=True)


def test_extras_name_extras_that_are_there() -> None:
    extras = PROJECT["optional-dependencies"]
    for lines in extras.values():
        for requirement in map(Requirement, lines):
            if normal(requirement.name) == "knnlm-hf":
                assert requirement.extras <= set(extras)
