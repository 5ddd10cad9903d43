"""The report in Chromium, from a file: what people see on a screen, a phone, in the dark and on paper."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.report import write_report
from dpo_ray.run_comparison import write_comparison
from tests.unit.runs import HOSTILE, complete_run

sync_api = pytest.importorskip("playwright.sync_api", reason="the page is opened by playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "device_scale_factor": 2}
SECTIONS = 11
Page = Any
"""Playwright's; its module may be missing."""

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with everything, each with its report, and their comparison."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("hh", "with-a-name-that-is-so-long-that-it-must-be-broken-somewhere-on-a-telephone"):
        complete_run(folder / name)
    write_report(str(folder / "hh"))
    write_comparison([str(path) for path in sorted(folder.iterdir())])
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Open]:
    """Opens files. What the console says, or what is asked of anything but the file itself, fails the test."""
    contexts, problems = [], []

    def opened(path: Path, **options: Any) -> Page:
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        allowed = (path.as_uri(), "data:")
        page.on("request", lambda request: request.url.startswith(allowed) or problems.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def luminance(page: Page, element: str, what: str) -> float:
    """Relative luminance (WCAG 2) of an element's colour, or of what is behind it."""
    colour = page.eval_on_selector(element, f"e => getComputedStyle(e).{what}")
    channels = [int(value) / 255 for value in re.findall(r"\d+", colour)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Page, element: str, behind: str = "body") -> float:
    pair = luminance(page, element, "color"), luminance(page, behind, "backgroundColor")
    return (max(pair) + 0.05) / (min(pair) + 0.05)


def test_every_section_is_seen_and_reached_from_the_contents(tab: Open, folder: Path):
    page = tab(folder / "hh" / "report.html")
    links = page.locator("nav a")
    assert links.count() == SECTIONS
    for number in range(SECTIONS):
        link = links.nth(number)
        link.click()
        section = page.locator(link.get_attribute("href"))
        section.locator("h2").wait_for(state="visible")
        assert section.locator("h2").inner_text() == link.inner_text()
        assert section.bounding_box()["height"] > 60


def test_every_picture_is_drawn(tab: Open, folder: Path):
    page = tab(folder / "hh" / "report.html")
    widths = page.eval_on_selector_all("img", "all => all.map(e => e.naturalWidth * e.complete)")
    assert len(widths) == 13
    assert min(widths) > 700


def test_what_users_wrote_is_shown_and_does_nothing(tab: Open, folder: Path):
    page = tab(folder / "hh" / "report.html")
    assert HOSTILE in page.locator("#examples").inner_text()
    assert page.locator("script, [onerror]").count() == 0


def test_a_long_text_opens(tab: Open, folder: Path):
    page = tab(folder / "hh" / "report.html")
    details = page.locator("#examples details")
    before = details.bounding_box()["height"]
    details.locator("summary").click()
    assert details.bounding_box()["height"] > before
    assert not page.locator("#examples .cut").is_visible()


def test_the_page_could_not_load_anything(chromium: Any, folder: Path):
    """Its own policy holds: what came into it and asked for a picture or a script from elsewhere would be refused."""
    page = chromium.new_page()
    page.goto((folder / "hh" / "report.html").as_uri())
    page.evaluate(
        """() => {
            window.refused = [];
            document.addEventListener("securitypolicyviolation", e => refused.push(e.effectiveDirective));
            for (const tag of ["img", "script", "iframe"]) {
                const made = document.createElement(tag);
                made.src = "http://127.0.0.1:9/x";
                document.body.append(made);
            }
            document.body.setAttribute("style", "color: red");
            fetch("http://127.0.0.1:9/x").catch(() => null);
        }"""
    )
    page.wait_for_function("refused.length >= 5", timeout=10_000)
    expected = ["connect-src", "frame-src", "img-src", "script-src-elem", "style-src-attr"]
    assert sorted(page.evaluate("refused")) == expected
    page.close()


@pytest.mark.parametrize("name", ["hh/report.html", "comparison.html"])
def test_a_phone_never_scrolls_sideways(tab: Open, folder: Path, name: str):
    page = tab(folder / name, **PHONE)
    assert page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]
    boxes = page.eval_on_selector_all(".wide", "all => all.map(e => [e.scrollWidth > e.clientWidth, e.clientWidth])")
    assert any(scrolls for scrolls, _ in boxes), "wide tables scroll in their own boxes"
    assert all(width <= 390 for _, width in boxes)
    assert page.eval_on_selector_all("img", "all => Math.min(...all.map(e => e.clientWidth))") > 300


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_the_light_and_in_the_dark(tab: Open, folder: Path, scheme: str):
    page = tab(folder / "hh" / "report.html", color_scheme=scheme)
    assert (luminance(page, "body", "backgroundColor") < 0.1) == (scheme == "dark")
    for element, behind in (("p", "body"), ("figcaption", "body"), ("th", "body"), ("nav a", "body")):
        assert contrast(page, element, behind) > 4.5, element
    for element, behind in ((".numbers dt", ".numbers div"), (".preferred", ".preferred"), (".more", ".preferred")):
        assert contrast(page, element, behind) > 4.5, element


def test_paper_has_everything_and_is_light(tab: Open, folder: Path):
    page = tab(folder / "hh" / "report.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert luminance(page, "body", "backgroundColor") > 0.9
    assert contrast(page, "p") > 4.5
    assert not page.locator("nav").is_visible()
    assert page.locator("#recipe pre").is_visible(), "what is folded on the screen"
    assert page.pdf(format="A4").startswith(b"%PDF")
