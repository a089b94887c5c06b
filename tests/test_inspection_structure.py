"""The page without a browser: its references lead somewhere, its colours can be told apart.

What only a browser can say is in test_inspection_browser.py.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from itertools import pairwise

import hostile_text
import pytest

from knnlm_hf import explanation_page

REFERENCES = ("aria-labelledby", "aria-describedby", "aria-controls", "for")
HEX = re.compile(r"--([\w-]+): #([0-9a-f]{6});")


class Tags(HTMLParser):
    """Every tag's name and attributes, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    knn = hostile_text.knn(tmp_path_factory.mktemp("structure") / "store")
    return explanation_page(knn, hostile_text.TEXT, title=hostile_text.TITLE)


def test_names_and_references(page: str) -> None:
    tags = Tags(page).found
    names = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(set(names)) == len(names)
    wanted = [
        name
        for _, attributes in tags
        for reference in REFERENCES
        for name in (attributes.get(reference) or "").split()
    ]
    assert wanted
    assert set(wanted) <= set(names)


def test_a_reader_without_sight_finds_its_way(page: str) -> None:
    tags = Tags(page).found
    kinds = [tag for tag, _ in tags]
    assert next(attributes for tag, attributes in tags if tag == "html")["lang"] == "en"
    assert [kinds.count(tag) for tag in ("title", "h1", "main", "header", "footer")] == [1] * 5
    levels = [int(tag[1]) for tag in kinds if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(deeper - level <= 1 for level, deeper in pairwise(levels))
    for tag, attributes in tags:
        if tag in ("section", "aside"):
            assert "aria-labelledby" in attributes
        if tag == "button":
            assert attributes.get("aria-label")
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
    assert any(attributes.get("role") == "status" for _, attributes in tags)


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of six hexadecimal digits."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_by_hand() -> None:
    assert contrast("000000", "ffffff") == pytest.approx(21)
    assert contrast("767676", "ffffff") == pytest.approx(4.54, abs=0.01)  # the known least grey


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_can_be_read_on_every_colour(page: str, scheme: str) -> None:
    style = re.search(r"<style>(.*?)</style>", page, flags=re.S)
    assert style
    found = re.findall(r":root \{(.*?)\}", style[1], flags=re.S)
    light, dark, paper = (dict(HEX.findall(colours)) for colours in found)
    colours = {"light": light, "dark": light | dark, "print": light | paper}[scheme]
    grounds = [f"{who}-{i}" for who in ("model", "memory") for i in (1, 2, 3)]
    for ground in ("paper", *grounds):
        assert contrast(colours["ink"], colours[ground]) >= 4.5, ground
    assert contrast(colours["quiet"], colours["paper"]) >= 4.5
    for line in ("model", "memory", "focus"):  # what is no text
        assert contrast(colours[line], colours["paper"]) >= 3, line


def test_nothing_is_fetched(page: str) -> None:
    assert not re.search(r"url\(|@import", page)
    for tag, attributes in Tags(page).found:
        assert tag not in {"img", "iframe", "object", "embed", "video", "audio", "base", "form"}
        assert not {"src", "srcset", "data", "action", "poster"} & attributes.keys()
