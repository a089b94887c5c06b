"""The page in a real browser: keys, pointer, telephone, dark, print.

Needs Chromium, ChromeDriver and selenium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_text
import pytest

from knnlm_hf import explanation_page

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium or ChromeDriver")

_FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync hide-scrollbars"
)
_PANEL_TAGS = "button, h2, h3, div, p, table, tbody, tr, th, td, span, ol, li, b"
_WALK = """((allowed) => {
    let shown = "", strange = 0;
    for (const token of document.querySelectorAll("#text .t")) {
        token.focus();
        shown += panel.textContent;
        strange += panel.querySelectorAll(`:not(${allowed})`).length;
    }
    return [shown, strange];
})(arguments[0])"""
_LEVELS = ["m3", "m2", "m1", "even", "k1", "k2", "k3", "first"]


class Browser:
    """One page in headless Chromium."""

    def __init__(self, page: Path, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*_FLAGS.split(), f"user-data-dir={profile}"):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        self.page = page.as_uri()

    def open(self, width: int = 1280, height: int = 900, **media: str) -> None:
        mobile = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        kind = media.pop("media", "")
        features = [{"name": k.replace("_", "-"), "value": v} for k, v in media.items()]
        emulated = {"media": kind, "features": features}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        self.driver.get(self.page)

    def __call__(self, script: str, *args: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *args)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def press(self, *keys: str) -> None:
        for key in keys:
            code = getattr(webdriver.Keys, key)
            webdriver.ActionChains(self.driver, duration=0).send_keys(code).perform()

    @property
    def focused(self) -> int:
        """The number of the token in focus, −1 where it is another element."""
        return self("[...document.querySelectorAll('#text .t')].indexOf(document.activeElement)")

    @property
    def panel(self) -> str:
        """What the panel says, "" while it is hidden."""
        return self("panel.checkVisibility() ? panel.innerText : ''")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    knn = hostile_text.knn(folder / "store")
    page = explanation_page(knn, hostile_text.TEXT, title=hostile_text.TITLE)
    (folder / "page.html").write_text(page, encoding="utf-8")
    browser = Browser(folder / "page.html", folder / "profile")
    try:
        yield browser
    finally:
        browser.driver.quit()


def test_keyboard(browser: Browser) -> None:
    browser.open()
    tokens = browser.all("#text .t")
    assert browser.panel == ""
    browser.press("TAB")
    assert browser.focused == 0
    assert "nothing predicts" in browser.panel
    browser.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "ARROW_RIGHT")
    assert browser.focused == 2
    assert f"“{tokens[2].text}”" in browser.panel
    assert f"token 3 of {len(tokens)}" in browser.panel
    for part in ("model", "memory", "mixture", "Neighbours", "document"):
        assert part in browser.panel
    assert "neighbours" in browser("document.getElementById('status').textContent")
    outline = "getComputedStyle(document.activeElement)"
    assert browser(f"{outline}.outlineStyle") == "solid"
    assert float(browser(f"{outline}.outlineWidth").removesuffix("px")) >= 2
    assert browser("document.querySelectorAll('[aria-selected=true]').length") == 1
    browser.press("END")
    assert browser.focused == len(tokens) - 1
    browser.press("ARROW_RIGHT", "HOME", "ARROW_DOWN")
    second = browser.focused
    assert tokens[second].rect["y"] > tokens[0].rect["y"]
    assert tokens[second - 1].rect["y"] == tokens[0].rect["y"]  # the next line, at its start
    browser.press("ARROW_UP")
    assert tokens[browser.focused].rect["y"] == tokens[0].rect["y"]
    browser.press("HOME", "ESCAPE")
    assert browser.panel == ""
    assert browser.focused == 0
    browser.press("ARROW_RIGHT", "TAB", "TAB", "ESCAPE")  # from within the panel
    assert (browser.panel, browser.focused) == ("", 1)
    browser.press("ARROW_RIGHT", "TAB")  # the text is one stop, no trap
    assert browser("document.activeElement.id") == "panel"


def test_pointer(browser: Browser) -> None:
    """Hovering shows; choosing keeps; the button closes."""
    browser.open()
    tokens = browser.all("#text .t")
    webdriver.ActionChains(browser.driver).move_to_element(tokens[5]).perform()
    assert "token 6 of" in browser.panel
    webdriver.ActionChains(browser.driver).move_to_element(tokens[8]).perform()
    assert "token 9 of" in browser.panel
    tokens[8].click()
    webdriver.ActionChains(browser.driver).move_to_element(tokens[5]).perform()
    assert "token 9 of" in browser.panel
    browser.all("#close")[0].click()
    assert browser.panel == ""
    webdriver.ActionChains(browser.driver).move_to_element(tokens[5]).perform()
    assert "token 6 of" in browser.panel


def test_nothing_of_a_text_runs_or_becomes_an_element(browser: Browser) -> None:
    """Every token's panel is shown once; the words are there, as words."""
    browser.open()
    elements = "document.querySelectorAll('script, img, iframe, style, [onclick]').length"
    before = browser(elements)
    shown, strange = browser(_WALK, _PANEL_TAGS)
    assert strange == 0
    for attack in ("</script><script>alert(1)</script>", "<img/src=x/onerror=alert(2)>"):
        assert attack in shown
    assert browser(elements) == before
    assert browser("document.title").startswith(hostile_text.TITLE)
    assert browser("performance.getEntriesByType('resource').length") == 0
    assert browser.driver.get_log("browser") == []
    browser(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'hit = 1'}))"
    )
    assert browser("window.hit") is None  # the page's policy would stop even one that got in
    assert "Content Security Policy" in browser.driver.get_log("browser")[0]["message"]


def test_screen_reader(browser: Browser) -> None:
    """What the accessibility tree has of the text: one list, an option per token, who predicted."""
    browser.open()
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"]
    ]
    assert ("listbox", "Text") in named
    options = [name for role, name in named if role == "option"]
    assert len(options) == len(hostile_text.TEXT)
    assert all("likelier" in o or "alike" in o or "nothing predicts" in o for o in options)
    assert {"banner", "main", "contentinfo", "heading"} <= {role for role, _ in named}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_telephone(browser: Browser, scheme: str) -> None:
    browser.open(360, 740, prefers_color_scheme=scheme)
    width = "document.documentElement.scrollWidth"
    assert browser(width) <= 360
    for token in (30, len(hostile_text.TEXT) - 1):
        chosen = browser.all("#text .t")[token]
        browser("arguments[0].scrollIntoView({block: 'start'})", chosen)
        chosen.click()
        assert browser(width) <= 360
        panel = browser("panel.getBoundingClientRect().toJSON()")
        assert panel["height"] <= 0.55 * 740
        # Seen, not under the panel.
        assert browser("document.activeElement.getBoundingClientRect().bottom") <= panel["top"]
    assert browser.focused == len(hostile_text.TEXT) - 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, scheme: str) -> None:
    """At least 4.5 between text and what it stands on, in every colour."""
    browser.open(prefers_color_scheme=scheme)
    dark = luminance(browser("getComputedStyle(document.body).backgroundColor")) < 0.2
    assert dark == (scheme == "dark")
    for level in _LEVELS:
        assert contrast(browser, f".legend .{level}") >= 4.5, level
    browser.all("#text .t")[30].click()
    for quiet in (".hint", ".panel .quiet", ".quote", "footer"):
        assert contrast(browser, quiet) >= 4.5, quiet


def test_levels_differ_without_colour(browser: Browser) -> None:
    browser.open()
    looks = []
    for level in _LEVELS[:-1]:
        style = f"getComputedStyle(document.querySelector('.legend .{level}'))"
        looks.append((browser(f"{style}.borderBottomStyle"), browser(f"{style}.borderBottomWidth")))
    assert len(set(looks)) == len(looks)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print(browser: Browser, scheme: str) -> None:
    """On paper: no panel, all that it needs, black on white, whatever the screen."""
    browser.open()
    browser.all("#text .t")[30].click()
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    emulated = {"media": "print", "features": features}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
    assert browser.panel == ""
    for selector in (".legend", ".helped", "table", "#text", "footer"):
        assert browser.all(selector)[0].is_displayed()
    assert luminance(browser("getComputedStyle(document.body).backgroundColor")) == 1
    assert luminance(browser("getComputedStyle(document.body).color")) == 0
    for level in _LEVELS:
        assert contrast(browser, f".legend .{level}") >= 4.5, level
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert len(pdf) > 10_000


def test_without_scripts(browser: Browser) -> None:
    """The text and every figure are there; only the panel is not."""
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open()
        assert browser.all("noscript p")[0].is_displayed()
        assert browser.all("#text")[0].is_displayed()
        assert browser.all(".helped li")
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def contrast(browser: Browser, selector: str) -> float:
    """WCAG 2's contrast of an element's text with the nearest background behind it."""
    ink = browser("getComputedStyle(document.querySelector(arguments[0])).color", selector)
    paper = browser(
        """(() => {
            let one = document.querySelector(arguments[0]);
            for (; one; one = one.parentElement) {
                const colour = getComputedStyle(one).backgroundColor;
                if (colour !== "rgba(0, 0, 0, 0)") return colour;
            }
        })()""".replace("arguments[0]", repr(selector))
    )
    high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
