"""The page in a real browser: nothing is fetched, nothing complains, nothing sticks out on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweep_folder import ablation, grid

from blockwright.lab.report.build import write
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    long = {f"a_name_without_any_space_that_goes_on_and_on_{i}": [2.0 + 0.01 * i, 2.1] for i in range(12)}
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    return [write(find(read(folder))) for folder in (ablation(folders[0]), grid(folders[1], long))]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_page_fits_and_is_quiet(browser: Any, pages: list[Path], width: int, scheme: str) -> None:
    for file in pages:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=complaints: said.append(message.text))
        page.on("pageerror", lambda error, said=complaints: said.append(str(error)))
        page.goto(file.as_uri())
        assert asked == [file.as_uri()] and complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        rights = "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().right)"
        assert max(page.evaluate(rights)) <= width
        page.close()


def test_no_letter_of_a_chart_is_cut_off(browser: Any, pages: list[Path]) -> None:
    script = """[...document.querySelectorAll('svg.chart text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(t => t.closest('svg').getAttribute('aria-labelledby') + ': ' + t.textContent)"""
    for file in pages:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(file.as_uri())
        assert page.evaluate(script) == []
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_can_be_told_from_the_page(browser: Any, pages: list[Path], scheme: str) -> None:
    script = """() => {
        const luminance = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(v => v / 255)
            .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b; };
        const paper = luminance(getComputedStyle(document.body).backgroundColor);
        const ratio = c => { const l = luminance(c); return (Math.max(l, paper) + .05) / (Math.min(l, paper) + .05); };
        const styles = (of, what) => [...document.querySelectorAll(of)].map(e => getComputedStyle(e)[what]);
        const html = styles('p, td, th, li, figcaption, h1, h2, h3', 'color'), drawn = styles('svg text', 'fill');
        const lines = styles('svg .curve, svg .ring', 'stroke');
        return [Math.min(...[...html, ...drawn].map(ratio)), Math.min(...lines.map(ratio))];
    }"""
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    page.goto(pages[1].as_uri())
    letters, lines = page.evaluate(script)
    assert letters >= 4.5 and lines >= 2.7
    page.close()


def test_tables_are_scrolled_by_key(browser: Any, pages: list[Path]) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(pages[0].as_uri())
    page.focus("#arms .scroll")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('#arms .scroll').scrollLeft > 0", timeout=3000)
    page.close()
