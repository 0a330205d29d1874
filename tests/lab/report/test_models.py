"""The models of a report's arms: drawn from checkpoints, as data; folded; none where there is nothing to show."""

import os
import pickle
import re
from xml.etree import ElementTree as ET

import pytest
import torch
from sweep_folder import ablation, grid

from blockwright.blocks.compose import preset
from blockwright.lab.report import build
from blockwright.lab.report.findings import find
from blockwright.lab.report.models import models
from blockwright.lab.report.reading import read

ARMS = {"mha": 0, "gqa": 3, "mla": 6, "moe": 9, "broken <b>&": 12}  # of ``ablation``: number of the first run


def save(folder, attention, **changes):
    """A checkpoint as a training leaves it, without weights."""
    made = folder / "checkpoints" / "last.ckpt"
    made.parent.mkdir(exist_ok=True)
    model = preset("tiny", {"vocab_size": 257, "n_layers": 1, "attention": attention, **changes})
    torch.save({"state_dict": {}, "hyper_parameters": {"model": model}}, made)
    return made


@pytest.fixture
def sweep(tmp_path):
    """Arms of three attentions, and two that have the baseline's."""
    folder = ablation(tmp_path)
    for arm, attention in {"mha": "mha", "gqa": "gqa", "mla": "mha", "moe": "mha", "broken <b>&": "mqa"}.items():
        save(folder / str(ARMS[arm]), attention)
    return folder


def drawn(folder):
    return {each.heading: each for each in models(find(read(folder)))}


@pytest.mark.slow
def test_each_arm_with_another_model_is_drawn_against_the_baseline(sweep):
    found = drawn(sweep)
    names = ["mha, the baseline", *(f"{arm}, against mha" for arm in ("gqa", "broken <b>&"))]
    assert [*found] == names
    root = ET.fromstring(found["gqa, against mha"].inline)
    marks = {g.get("data-path"): g.get("class") for g in root.iter("g") if g.get("data-path")}
    assert marks["layers.0.attention"] == "changed" and marks["layers.0.ffn"] == marks["head"] == "same"
    assert "attention mha → gqa" in found["gqa, against mha"].caption
    assert {"a", "b"} <= {g.get("data-side") for g in ET.fromstring(found["gqa, against mha"].alone).iter()}


@pytest.mark.slow
def test_page_has_them_folded_with_one_style_sheet_and_patterns_of_their_own(sweep):
    page = build.write(find(read(sweep))).read_text()
    assert page.count('<details class="model">') == 3 and page.count("<style>") == 1
    patterns = re.findall(r'<pattern id="([\w-]+)"', page)
    assert len(patterns) == len(set(patterns)) == 3 and set(re.findall(r"fill: url\(#(bw-hatch-[\w]+)\)", page)) <= {
        *patterns
    }
    assert "broken &lt;b&gt;&amp;" in page and "<b>" not in page
    assert len(page) < 150_000
    for name in re.findall(r'href="(model-[\w]+\.svg)"', page):
        assert ET.fromstring((sweep / "report" / name).read_text()).tag.endswith("svg")
    assert "[gqa, against mha](model-1.svg)" in (sweep / "report" / "report.md").read_text()


def test_sweep_of_rates_has_one_picture_and_one_without_checkpoints_none(tmp_path):
    folder = grid(tmp_path, {"a": [2.0], "b": [2.1]})
    assert not models(find(read(folder)))
    assert "The models" not in build.write(find(read(folder))).read_text()
    for job in ("0", "1"):
        save(folder / job, "mha")
    assert len(models(find(read(folder)))) == 1


def test_pictures_of_many_arms_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("blockwright.lab.report.models.MANY", 1)
    folder = grid(tmp_path, {f"a{i}": [2.0 + i] for i in range(3)})
    for i in range(3):
        save(folder / str(i), "mha", max_positions=64 + i)
    assert len(models(find(read(folder)))) == 1


class Runs:
    """Unpickled, it writes a file."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def test_checkpoint_that_is_hostile_or_damaged_is_left_out(sweep, monkeypatch):
    monkeypatch.chdir(sweep)
    (sweep / "3/checkpoints/last.ckpt").write_bytes(pickle.dumps(Runs()))
    (sweep / "6/checkpoints/last.ckpt").write_text("half a file")
    elsewhere = save(sweep.parent, "gqa").rename(sweep.parent / "elsewhere.ckpt")
    (sweep / "12/checkpoints/last.ckpt").unlink()
    (sweep / "12/checkpoints/last.ckpt").symlink_to(elsewhere)
    model = {"vocab_size": 257, "_target_": "os.system"}
    torch.save({"state_dict": {}, "hyper_parameters": {"model": model}}, sweep / "9/checkpoints/last.ckpt")
    assert [*drawn(sweep)] == ["mha, the baseline"]
    assert not (sweep / "ran").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("width", [320])
def test_pictures_fit_a_phone_and_are_hatched(browser, sweep, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(build.write(find(read(sweep))).as_uri())
    assert page.evaluate("[...document.querySelectorAll('svg.scheme')].every(s => !s.checkVisibility())")
    page.evaluate("document.querySelectorAll('details.model').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate("[...document.querySelectorAll('svg.scheme')].map(s => s.getBoundingClientRect().right)")
    assert len(sizes) == 3 and max(sizes) <= width
    fills = "[...document.querySelectorAll('svg.scheme rect.hatch')].map(r => getComputedStyle(r).fill)"
    assert set(page.evaluate(fills)) >= {'url("#bw-hatch-baseline")', 'url("#bw-hatch-1")'}
    page.close()
