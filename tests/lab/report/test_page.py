"""The page, the Markdown, the CSV, the charts and the terminal: whole, escaped, traceable, and of one file."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_folder import ablation, completed, falling, grid, write_job

from blockwright.lab.report import build, costs, scale, svg, terminal, words
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read

pytestmark = pytest.mark.xdist_group("report_page")  # its fixture is slow to set up

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Reader(HTMLParser):
    """Tags in order, their attributes, the text; refuses what is not closed as it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if not self.open or self.open[-1] not in ("style", "title") else ""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ablation(tmp_path_factory.mktemp("page"))
    build.write(find(read(folder)))
    return folder


@pytest.fixture(scope="module")
def page(sweep: Path) -> Reader:
    return Reader((sweep / "report" / "index.html").read_text())


def test_page_is_whole_and_names_every_arm(page: Reader) -> None:
    names = [tag for tag, _ in page.tags]
    assert names[0] == "html" and names.count("h1") == 1 and "main" in names
    for arm in ("mha", "gqa", "mla", "moe", "broken <b>&"):
        assert arm in page.text
    assert "mla is better than mha by 0.0" in page.text and "1 of 3 seeds of gqa is lost" in page.text
    assert "with the variance pooled over 3 or 4 arms" in page.text and "four times in five" in page.text
    assert "4 of 15 runs are lost (1 diverged, 3 failed)" in page.text


def test_page_asks_the_network_for_nothing(sweep: Path) -> None:
    for file in (sweep / "report").glob("*.*"):
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|src=", text), file
        assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text), file


def test_every_link_leads_somewhere(sweep: Path, page: Reader) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    found = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    for href in found:
        target = sweep / "report" / unquote(href)
        assert (href.startswith("#") and href[1:] in ids) or target.exists(), href
    assert {f"../{job}/" for job in range(15)} <= set(found)


def test_every_table_scrolls_within_itself_and_can_be_reached_by_key(page: Reader) -> None:
    around = [attrs for tag, attrs in page.tags if attrs.get("class") == "scroll"]
    assert len(around) == [tag for tag, _ in page.tags].count("table") >= 4
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in around)


def test_charts_say_what_they_show(page: Reader) -> None:
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    ids = {attrs.get("id") for _, attrs in page.tags}
    assert len(charts) == 8  # differences, tokens, FLOPs, gap, three costs, experts
    assert all(c["role"] == "img" and c["aria-labelledby"] in ids for c in charts)


def test_names_and_reasons_run_no_code(sweep: Path) -> None:
    for file in (sweep / "report").glob("*.html"):
        assert "<script" not in file.read_text() and "<b>" not in file.read_text()
    assert "&lt;script&gt;" in (sweep / "report" / "index.html").read_text()
    assert "<script" not in (sweep / "report" / "report.md").read_text().replace("\\<", "")


def test_charts_are_files_of_their_own(sweep: Path) -> None:
    files = {file.name for file in (sweep / "report").glob("*.svg")}
    assert {"differences.svg", "loss-over-tokens.svg", "trade-cache-bytes.svg", "experts-3.svg"} <= files
    for file in (sweep / "report").glob("*.svg"):
        root = ET.fromstring(file.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        numbers = [v for e in root.iter() for k, v in e.attrib.items() if k in ("x", "y", "x1", "y1", "cx", "cy", "d")]
        assert numbers and not any("nan" in n or "inf" in n for n in numbers), file
        assert "prefers-color-scheme: dark" in file.read_text()


def test_paired_differences_are_drawn_where_they_are(sweep: Path) -> None:
    root = ET.fromstring((sweep / "report" / "differences.svg").read_text())
    space = {"s": "http://www.w3.org/2000/svg"}
    zero = float(root.find(".//s:line[@class='zero']", space).attrib["x1"])  # type: ignore[union-attr]
    rings = {}
    for arm in ("s1", "s2", "s3"):
        found = root.iterfind(f".//s:circle[@class='ring {arm}']", space)
        rings[arm] = [float(ring.attrib["cx"]) for ring in found]
    assert [len(found) for found in rings.values()] == [2, 3, 3]
    assert all(x < zero - 20 for x in rings["s2"]) and max(rings["s3"]) < min(rings["s2"])  # moe beats mla beats mha


def test_markdown_tells_the_same(sweep: Path) -> None:
    text = (sweep / "report" / "report.md").read_text()
    assert text.startswith("# attention\n\n> 4 of 15 runs are lost")
    assert "* **better**: mla is better than mha by" in text and "![Paired differences](differences.svg)" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (sweep / "report" / target).exists(), target
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_csv_has_a_line_for_every_run(sweep: Path) -> None:
    with (sweep / "report" / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["job"] for line in lines] == [str(i) for i in range(15)]
    assert lines[6]["arm"] == "mla" and float(lines[6]["val/loss"]) < 2 and lines[6]["cache_bytes"] == "144"
    assert lines[12]["status"] == "failed" and "<script>" in lines[12]["reason"]
    assert all((sweep / "report" / line["folder"]).is_dir() for line in lines)


def test_matching_is_shown_in_every_budget(page: Reader, sweep: Path) -> None:
    assert "model.ffn.d_ff 512 → 736" in page.text and "params within 0.5 %" in page.text
    assert "−71.88 %" in page.text and "+2.00 %" in page.text


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_the_verdicts(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    findings = find(read(sweep))
    piped, terminal_of_80 = StringIO(), Terminal()
    for file in (piped, terminal_of_80):
        terminal.show(findings, sweep / "report" / "index.html", file)
    for said in (piped.getvalue(), terminal_of_80.getvalue()):
        assert said.rstrip().endswith("report/index.html")
        assert "broken <b>&" in said and "no verdict" in said and "corrected for" in said
    shown = re.sub(r"\x1b\[[0-9;]*m", "", terminal_of_80.getvalue())  # bold and colour
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    verdicts = [found["text"] for found in build.headline(findings)]
    assert all(verdict in piped.getvalue() for verdict in verdicts)  # each in one line


def test_half_a_sweep_says_so_on_top(tmp_path: Path) -> None:
    file = build.write(find(read(grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, None], "gqa": [None, None]}))))
    page = file.read_text()
    assert page.index("Not finished: 3 of 6 runs have no result yet") < page.index("<main>")
    assert "gqa has no result yet." in page
    assert "1 of the 2 seeds of mla and mha have ended." in page


def test_many_seeds_leave_an_arms_figures_in_sight(tmp_path: Path) -> None:
    page = build.write(find(read(ablation(tmp_path, seeds=12)))).read_text()
    reader = Reader(page)
    assert "12 of 12:" in reader.text
    arms = page[page.index("seeds: runs") :]
    assert arms[: arms.index("</table>")].count('href="../') == 2 * 5  # the first and the last of each arm
    assert all(f'href="../{job}/"' in page for job in range(12))  # by seed


def test_search_shows_its_best_trial_first(tmp_path: Path) -> None:
    for i, loss in enumerate([2.5, 2.0, 2.25, 1.75, 3.0]):
        write_job(tmp_path, i, [f"optimizer.lr=0.0{i + 1}"], completed(loss), falling(loss, random.Random(i)))
    plan = {"kind": "search", "name": "rates", "metric": "val/loss", "direction": "minimize"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    reader = Reader(build.write(find(read(tmp_path))).read_text())
    assert "Trial 3 of 5 is the best: val/loss 1.7500 with lr=0.04" in reader.text
    assert (tmp_path / "report" / "search.svg").exists() and "baseline" not in reader.text


def test_rates_are_shown_where_they_were_swept(tmp_path: Path) -> None:
    jobs = []
    for arm, best in (("mha", 0.01), ("mla", 0.03)):
        for lr in (0.003, 0.01, 0.03):
            for seed in (0, 1):
                job = {"job": len(jobs), "overrides": [f"a={arm}"], "arm": arm, "seed": seed, "lr": lr}
                write_job(tmp_path, len(jobs), [], completed(2.0 + (lr != best) + 0.01 * seed))
                jobs.append(job)
    arms = [{"name": n, "baseline": n == "mha", "overrides": [], "figures": {}, "match": None} for n in ("mha", "mla")]
    plan = {"kind": "ablation", "name": "x", "metric": "val/loss", "direction": "minimize", "jobs": jobs, "arms": arms}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    text = Reader(build.write(find(read(tmp_path))).read_text()).text
    assert "0.03 (edge)" in text and "the best rate of mla is the largest tried." in text
    assert (tmp_path / "report" / "tuning-optimizer-lr.svg").exists()
    assert not (tmp_path / "report" / "loss-over-tokens.svg").exists()  # no run left curves


def test_older_report_is_replaced(tmp_path: Path) -> None:
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "experts-9.svg").write_text("old")
    build.write(find(read(tmp_path)))
    shutil.rmtree(tmp_path / "1")
    build.write(find(read(tmp_path)))
    left = {file.name for file in (tmp_path / "report").iterdir()}
    assert "experts-9.svg" not in left and not [name for name in left if name.endswith(".partial")]
    assert "mla" not in Reader((tmp_path / "report" / "index.html").read_text()).text


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_labels_keep_apart_and_within() -> None:
    placed = svg.apart([50.0, 50.0, 52.0, 10.0], 0.0, 100.0)
    order = sorted(placed)
    assert all(b - a >= svg.LINE - 1e-9 for a, b in pairwise(order))
    assert min(placed) >= 0 and max(placed) <= 100 and placed[3] < placed[0] < placed[1] < placed[2]
    assert max(svg.apart([99.0, 99.0], 0.0, 100.0)) <= 100 and min(svg.apart([1.0, 1.0, 1.0], 0.0, 100.0)) >= 0


def test_scales_put_values_in_place() -> None:
    assert scale.Scale(0, 10, 100, 200)(5) == 150
    log = scale.Scale(1, 100, 0, 200, log=True)
    assert log(10) == pytest.approx(100) and set(log.ticks(4)) >= {1.0, 10.0, 100.0}
    assert len(scale.Scale(900, 2100, 0, 1, log=True).ticks(4)) >= 3
    low, high = scale.padded([3.0, 3.0], least=0.1)
    assert low < 3 < high and scale.padded([0.0, 0.0])[1] > 0


def test_numbers_of_an_axis_have_decimals_alike() -> None:
    assert scale.spelt([-0.025, 0.0, 0.025]) == ["−0.025", "0.000", "0.025"]
    assert scale.spelt([2.0, 2.5, 3.0]) == ["2.0", "2.5", "3.0"] and scale.spelt([0, 100]) == ["0", "100"]


def test_long_names_keep_both_ends() -> None:
    assert svg.cut("short", 10) == "short"
    assert svg.cut("attention=mla d_ff=736", 12) == "attenti…=736"


def test_ticks_are_round_and_of_counts_whole() -> None:
    assert scale.Scale(0, 4, 0, 1, whole=True).ticks(4) == [0, 1, 2, 3, 4]
    assert scale.Scale(0, 3, 0, 1, whole=True).ticks(4) == [0, 1, 2, 3]
    assert scale.Scale(-0.06, 0.06, 0, 1).ticks(4) == pytest.approx([-0.05, 0.0, 0.05])
    assert scale.Scale(900, 7000, 0, 1, log=True).ticks(4) == [1000, 2000, 5000]
    assert scale.Scale(1, 2.5, 0, 1, log=True).ticks(4) == [1, 1.5, 2, 2.5]


@given(shift=st.floats(-1e3, 1e3), span=st.floats(1e-6, 1e9), most=st.integers(2, 8), whole=st.booleans())
def test_ticks_are_within_the_axis_and_not_too_many(shift: float, span: float, most: int, whole: bool) -> None:
    low = shift * span
    ticks = scale.Scale(low, low + span, 0, 1, whole=whole).ticks(most)
    assert len(ticks) <= most + 1 and all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in ticks)
    assert not whole or all(t == int(t) for t in ticks)


def test_number_that_is_rounded_to_nothing_has_no_sign() -> None:
    assert words.signed(-0.0013, 2) == words.signed(0.0013, 2) == "0.00"
    assert words.signed(-0.013, 2) == "−0.01" and words.signed(0.013, 2) == "+0.01"


def test_bar_that_continues_beyond_the_axis_ends_in_an_arrow(tmp_path: Path) -> None:
    build.write(find(read(grid(tmp_path, {"mha": [2.0, 2.1], "mla": [2.05, 2.35]}))))
    chart = ET.fromstring((tmp_path / "report" / "differences.svg").read_text())
    arrows = [element.get("class") for element in chart.iter() if "arrow" in element.get("class", "")]
    assert arrows == ["arrow s1", "arrow s1"]


def test_sweep_is_titled_by_what_differs(tmp_path: Path) -> None:
    grid(tmp_path / "one", {"mha": [2.0], "mla": [2.1]})
    assert read(tmp_path / "one").title == "attention: mha, mla"
    ablation(tmp_path / "two")
    assert read(tmp_path / "two").title == read(tmp_path / "two").name


@pytest.mark.parametrize(("right", "bar", "cls"), [(10, None, "halo end"), (200, None, "halo"), (200, 20, "halo end")])
def test_label_is_within_the_axes_and_off_the_bars(right: float, bar: float | None, cls: str) -> None:
    chart = svg.Chart("a", "a", 280, right=24)
    x = chart.x1 - right
    taken = [] if bar is None else [(x + bar, chart.y1, x + bar + 6, chart.y0)]
    costs._point_label(chart, "mqa", "s1", (x, 100.0), taken)
    (label,) = (element for element in chart.root if element.text == "mqa")
    assert label.get("class") == cls
