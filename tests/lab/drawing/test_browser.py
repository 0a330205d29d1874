"""Pictures in a real browser: no two texts meet, and nothing leaves the page, whatever its width."""

from pathlib import Path
from typing import Any

import pytest

from blockwright import registry
from blockwright.lab.drawing.alone import alone, block_picture
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.registry import presets

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

# Texts as rectangles of the screen, and pairs of them that meet by more than a pixel; texts that leave the sheet.
MEASURE = """() => {
  const sheet = document.querySelector('svg').getBoundingClientRect();
  const texts = [...document.querySelectorAll('svg text')].filter(t => t.textContent.trim());
  const boxes = texts.map(t => [t.textContent, t.getBoundingClientRect()]);
  const scale = sheet.width / 420;
  const meet = [], left = [];
  boxes.forEach(([text, p], i) => {
    if (p.left < sheet.left - 1 || p.right > sheet.right + 1 || p.top < sheet.top - 1 || p.bottom > sheet.bottom + 1)
      left.push(text);
    boxes.slice(i + 1).forEach(([other, q]) => {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > scale && high > 3 * scale) meet.push([text, other]);  // a line's box is higher than its letters
    });
  });
  return {meet, left, n: texts.length, wide: document.documentElement.scrollWidth, room: window.innerWidth};
}"""
PAGE = "<!doctype html><meta charset=utf-8><body style='margin:0'>"


@pytest.fixture(scope="module")
def pictures() -> dict[str, str]:
    """Name → the SVG of a part of the presets and of every block."""
    models = {n: {"vocab_size": 257, **presets.read(n)} for n in ("deepseek_v2", *presets.names()[::6])}
    drawn = {name: picture(scheme(model, name, 64), equations=True) for name, model in models.items()}
    blocks = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]
    return drawn | {f"{kind}/{name}": block_picture(alone(kind, name), equations=True) for kind, name in blocks}


@pytest.mark.parametrize(("width", "colours"), [(420, "light"), (1600, "dark")])
def test_no_text_meets_another_or_leaves_the_page(
    browser: Any, pictures: dict[str, str], width: int, colours: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colours)
    for name, svg in pictures.items():
        page.set_content(PAGE + svg)
        found = page.evaluate(MEASURE)
        assert found["n"] and found["meet"] == [] and found["left"] == [], (name, found)
        assert found["wide"] <= found["room"], name
    page.close()


def test_a_file_of_its_own_is_drawn_without_complaint(browser: Any, pictures: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "picture.svg"
    file.write_text(pictures["deepseek_v2"])
    page = browser.new_page(viewport={"width": 420, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.tagName") == "svg" and not said
    page.close()
