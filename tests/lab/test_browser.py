"""Pages and pictures in a real browser: nothing is fetched, nothing complains, nothing meets or sticks out."""

import pytest
from sweep_folder import ablation, grid

from blockwright import registry
from blockwright.lab.drawing.picture import alone, block_picture, picture
from blockwright.lab.drawing.scheme import scheme as scheme_of
from blockwright.lab.report.build import write
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.registry import presets

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    long = {f"a_name_without_any_space_that_goes_on_and_on_{i}": [2.0 + 0.01 * i, 2.1] for i in range(12)}
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    return [write(find(read(folder))) for folder in (ablation(folders[0]), grid(folders[1], long))]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark"), (320, "light")])
def test_page_fits_and_is_quiet(browser, pages, width, scheme):
    for file in pages:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked = []
        complaints = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, said=complaints: said.append(message.text))
        page.on("pageerror", lambda error, said=complaints: said.append(str(error)))
        page.goto(file.as_uri())
        assert asked == [file.as_uri()] and complaints == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        rights = "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().right)"
        assert max(page.evaluate(rights)) <= width
        page.close()


def test_no_letter_of_a_chart_is_cut_off(browser, pages):
    script = """[...document.querySelectorAll('svg.chart text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(t => t.closest('svg').getAttribute('aria-labelledby') + ': ' + t.textContent)"""
    for file in pages:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(file.as_uri())
        assert page.evaluate(script) == []
        page.close()


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
def pictures():
    """Name → the SVG of a part of the presets and of every block."""
    models = {n: {"vocab_size": 257, **presets.read(n)} for n in ("deepseek_v2", *presets.names()[::12])}
    drawn = {name: picture(scheme_of(model, name, 64), equations=True) for name, model in models.items()}
    blocks = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)[::3]]
    return drawn | {f"{kind}/{name}": block_picture(alone(kind, name), equations=True) for kind, name in blocks}


@pytest.mark.parametrize(("width", "colours"), [(420, "dark")])
def test_no_text_meets_another_or_leaves_the_page(browser, pictures, width, colours):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colours)
    for name, svg in pictures.items():
        page.set_content(PAGE + svg)
        found = page.evaluate(MEASURE)
        assert found["n"] and found["meet"] == [] and found["left"] == [], (name, found)
        assert found["wide"] <= found["room"], name
    page.close()


def test_a_file_of_its_own_is_drawn_without_complaint(browser, pictures, tmp_path):
    file = tmp_path / "picture.svg"
    file.write_text(pictures["deepseek_v2"])
    page = browser.new_page(viewport={"width": 420, "height": 900})
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.tagName") == "svg" and not said
    page.close()
