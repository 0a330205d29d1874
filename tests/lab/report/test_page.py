"""The page, the Markdown, the CSV, the charts and the terminal: whole, escaped, traceable, and of one file."""

import csv
import json
import random
import re
import shutil
from html.parser import HTMLParser
from io import StringIO
from urllib.parse import unquote
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sweep_folder import ablation, completed, falling, grid, write_job

from blockwright.lab.report import build, terminal
from blockwright.lab.report.findings import find
from blockwright.lab.report.reading import read
from blockwright.lab.report.svg import Scale

pytestmark = pytest.mark.xdist_group("report_page")  # its fixture is slow to set up

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Reader(HTMLParser):
    """Tags in order, their attributes, the text; refuses what is not closed as it was opened."""

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.tags = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if not self.open or self.open[-1] not in ("style", "title") else ""


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = ablation(tmp_path_factory.mktemp("page"))
    build.write(find(read(folder)))
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    return Reader((sweep / "report" / "index.html").read_text())


def test_page_is_whole_linked_and_reached_without_a_pointer(page, sweep):
    names = [tag for tag, _ in page.tags]
    assert names[0] == "html" and names.count("h1") == 1 and "main" in names
    for arm in ("mha", "gqa", "mla", "moe", "broken <b>&"):
        assert arm in page.text
    for told in ("mla is better than mha by 0.0", "1 of 3 seeds of gqa is lost", "4 of 15 runs are lost"):
        assert told in page.text
    assert "model.ffn.d_ff 512 → 736" in page.text and "−71.88 %" in page.text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    found = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    for href in found:
        target = sweep / "report" / unquote(href)
        assert (href.startswith("#") and href[1:] in ids) or target.exists(), href
    assert {f"../{job}/" for job in range(15)} <= set(found)
    around = [attrs for tag, attrs in page.tags if attrs.get("class") == "scroll"]
    assert len(around) == [tag for tag, _ in page.tags].count("table") >= 4
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in around)
    charts, ids = [attrs for tag, attrs in page.tags if tag == "svg"], {attrs.get("id") for _, attrs in page.tags}
    assert len(charts) == 8  # differences, tokens, FLOPs, gap, three costs, experts
    assert all(c["role"] == "img" and c["aria-labelledby"] in ids for c in charts)


def test_charts_are_files_of_their_own_with_values_in_place(sweep):
    files = {file.name for file in (sweep / "report").glob("*.svg")}
    assert {"differences.svg", "loss-over-tokens.svg", "trade-cache-bytes.svg", "experts-3.svg"} <= files
    for file in (sweep / "report").glob("*.svg"):
        root = ET.fromstring(file.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        numbers = [v for e in root.iter() for k, v in e.attrib.items() if k in ("x", "y", "x1", "y1", "cx", "cy", "d")]
        assert numbers and not any("nan" in n or "inf" in n for n in numbers), file
        assert "prefers-color-scheme: dark" in file.read_text()
    root = ET.fromstring((sweep / "report" / "differences.svg").read_text())
    space = {"s": "http://www.w3.org/2000/svg"}
    zero = float(root.find(".//s:line[@class='zero']", space).attrib["x1"])
    rings = {}
    for arm in ("s1", "s2", "s3"):
        found = root.iterfind(f".//s:circle[@class='ring {arm}']", space)
        rings[arm] = [float(ring.attrib["cx"]) for ring in found]
    assert [len(found) for found in rings.values()] == [2, 3, 3]
    assert all(x < zero - 20 for x in rings["s2"]) and max(rings["s3"]) < min(rings["s2"])  # moe beats mla beats mha


def test_markdown_and_csv_tell_the_same(sweep):
    text = (sweep / "report" / "report.md").read_text()
    assert text.startswith("# attention\n\n> 4 of 15 runs are lost")
    assert "* **better**: mla is better than mha by" in text and "![Paired differences](differences.svg)" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (sweep / "report" / target).exists(), target
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    with (sweep / "report" / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["job"] for line in lines] == [str(i) for i in range(15)]
    assert lines[6]["arm"] == "mla" and float(lines[6]["val/loss"]) < 2 and lines[6]["cache_bytes"] == "144"
    assert lines[12]["status"] == "failed" and "<script>" in lines[12]["reason"]
    assert all((sweep / "report" / line["folder"]).is_dir() for line in lines)


def test_many_seeds_leave_an_arms_figures_in_sight(tmp_path):
    page = build.write(find(read(ablation(tmp_path, seeds=12)))).read_text()
    reader = Reader(page)
    assert "12 of 12:" in reader.text
    arms = page[page.index("seeds: runs") :]
    assert arms[: arms.index("</table>")].count('href="../') == 2 * 5  # the first and the last of each arm
    assert all(f'href="../{job}/"' in page for job in range(12))  # by seed


def test_search_shows_its_best_trial_first(tmp_path):
    for i, loss in enumerate([2.5, 2.0, 2.25, 1.75, 3.0]):
        write_job(tmp_path, i, [f"optimizer.lr=0.0{i + 1}"], completed(loss), falling(loss, random.Random(i)))
    plan = {"kind": "search", "name": "rates", "metric": "val/loss", "direction": "minimize"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    reader = Reader(build.write(find(read(tmp_path))).read_text())
    assert "Trial 3 of 5 is the best: val/loss 1.7500 with lr=0.04" in reader.text
    assert (tmp_path / "report" / "search.svg").exists() and "baseline" not in reader.text


def test_older_report_is_replaced(tmp_path):
    grid(tmp_path, {"mha": [2.0], "mla": [1.9]})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "experts-9.svg").write_text("old")
    build.write(find(read(tmp_path)))
    shutil.rmtree(tmp_path / "1")
    build.write(find(read(tmp_path)))
    left = {file.name for file in (tmp_path / "report").iterdir()}
    assert "experts-9.svg" not in left and not [name for name in left if name.endswith(".partial")]
    assert "mla" not in Reader((tmp_path / "report" / "index.html").read_text()).text


@given(shift=st.floats(-1e3, 1e3), span=st.floats(1e-6, 1e9), most=st.integers(2, 8), whole=st.booleans())
def test_ticks_are_within_the_axis_and_not_too_many(shift, span, most, whole):
    low = shift * span
    ticks = Scale(low, low + span, 0, 1, whole=whole).ticks(most)
    assert len(ticks) <= most + 1 and all(low - 1e-6 * span <= t <= low + span * (1 + 1e-6) for t in ticks)
    assert not whole or all(t == int(t) for t in ticks)


def test_page_fetches_nothing_and_runs_no_code(sweep):
    for file in (sweep / "report").glob("*.*"):
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z]+\.|@import|src=", text), file
        assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", text), file
    for file in (sweep / "report").glob("*.html"):
        assert "<script" not in file.read_text() and "<b>" not in file.read_text()
    assert "&lt;script&gt;" in (sweep / "report" / "index.html").read_text()
    assert "<script" not in (sweep / "report" / "report.md").read_text().replace("\\<", "")


def test_terminal_and_pipe_show_the_verdicts(sweep, monkeypatch):
    for name, value in {"COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    findings, piped, of_80 = find(read(sweep)), StringIO(), StringIO()
    of_80.isatty = lambda: True
    for file in (piped, of_80):
        terminal.show(findings, sweep / "report" / "index.html", file)
    assert all(
        s.getvalue().rstrip().endswith("report/index.html") and "broken <b>&" in s.getvalue() for s in (piped, of_80)
    )
    shown = re.sub(r"\x1b\[[0-9;]*m", "", of_80.getvalue())  # bold and colour
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    assert all(found["text"] in piped.getvalue() for found in build.headline(findings))  # each in one line


def test_half_a_sweep_says_so_on_top(tmp_path):
    page = build.write(
        find(read(grid(tmp_path, {"mha": [2.0, 2.1], "mla": [1.9, None], "gqa": [None, None]})))
    ).read_text()
    assert page.index("Not finished: 3 of 6 runs have no result yet") < page.index("<main>")


def test_rates_are_shown_where_they_were_swept(tmp_path):
    jobs = []
    for arm, best in (("mha", 0.01), ("mla", 0.03)):
        for lr in (0.003, 0.01, 0.03):
            jobs.append({"job": len(jobs), "overrides": [f"a={arm}"], "arm": arm, "seed": 0, "lr": lr})
            write_job(tmp_path, len(jobs) - 1, [], completed(2.0 + (lr != best)))
    arms = [{"name": n, "baseline": n == "mha", "overrides": [], "figures": {}, "match": None} for n in ("mha", "mla")]
    plan = {"kind": "ablation", "name": "x", "metric": "val/loss", "direction": "minimize", "jobs": jobs, "arms": arms}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert "0.03 (edge)" in Reader(build.write(find(read(tmp_path))).read_text()).text
    assert (tmp_path / "report" / "tuning-optimizer-lr.svg").exists()
    assert not (tmp_path / "report" / "loss-over-tokens.svg").exists()  # no run left curves
