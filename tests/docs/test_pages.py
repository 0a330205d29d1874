"""The pages before they are built: every document has a place, its links lead to pages, answers are near."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt

from blockwright import registry
from blockwright.commands import commands
from blockwright.lazy import read_stub
from blockwright.registry import presets
from docs.site import papers, sources
from docs.site.__main__ import collect, write
from docs.site.markdown import for_builder, links, title
from docs.site.navigation import HOW_TO, configuration
from docs.site.pages import Pages

pytestmark = pytest.mark.xdist_group("pages")  # the fixture is costly
STUB = sources.ROOT / "src" / "blockwright" / "__init__.pyi"
PRESETS, KINDS = ["deepseek_v2", "tiny"], ["attention", "reward"]


@pytest.fixture(scope="module")
def pages() -> Pages:
    """All documents, and generated pages of two presets and two kinds."""
    return collect(PRESETS, [registry.catalogue.find_family(kind) for kind in KINDS])


@pytest.mark.slow
def test_every_document_is_a_page(pages: Pages) -> None:
    paths = {path for path in sources.documents() if path not in sources.GENERATED}
    assert {"docs/tutorial.md", "docs/how-to/sweep.md", "plugins/hub/README.md", "CONTRIBUTING.md"} <= paths
    for path in paths:
        assert title(pages.texts[sources.place(path)]), path


@pytest.mark.slow
def test_documents_read_alike_in_commonmark_and_by_the_builder(pages: Pages) -> None:
    """So that they are shown right next to the code too, and by another builder."""
    python_markdown = pytest.importorskip("markdown", reason="needs the extra site, which brings Python-Markdown")
    commonmark, elements = MarkdownIt("commonmark").enable("table"), r"<(li|[uo]l|t[dh]|pre|h\d|em|strong|code|a|img)\b"
    for place in map(sources.place, sources.documents()):
        text = pages.texts[place]
        built = python_markdown.markdown(for_builder(text), extensions=["tables", "fenced_code"])
        shown = [Counter(re.findall(elements, html)) for html in (commonmark.render(text), built)]
        assert shown[0] == shown[1], place


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("README.md", "index.md"),
        ("docs/how-to/README.md", "how-to/index.md"),
        ("plugins/serve/README.md", "how-to/serve.md"),
        ("plugins/vision/presets/deepseek_vl2_tiny.yaml", "reference/presets/deepseek_vl2_tiny.md"),
        ("conf/ladder/attention.yaml", "reference/comparisons/ladder/attention.md"),
        ("blocks/attention/mla.py", "reference/blocks/attention/mla.md"),
        ("blocks/attention/base.py", "source/blocks/attention/base.py.md"),
        ("benchmarks/results/ablations/pages/report/report.md", "results/ablations/pages.md"),
        ("benchmarks/results/ladders/attention/report/report.md", "results/ladders/attention.md"),
        ("docs/attention.svg", "files/docs/attention.svg"),
    ],
)
def test_place_of_a_file(path: str, place: str) -> None:
    assert (sources.ROOT / path).exists() and sources.place(path) == place


@pytest.mark.slow
def test_links_of_documents_lead_to_pages_and_files(pages: Pages) -> None:
    known = {*pages.texts, *pages.files}
    generated = re.compile(r"reference/(?:presets|blocks)/")  # only some of these are collected here
    for place, text in pages.texts.items():
        for target in links(text):
            path = target.removeprefix("/").partition("#")[0]
            assert target.startswith("/"), f"{place}: {target}"
            assert path in known or generated.match(path), f"{place}: {target}"


@pytest.mark.slow
def test_every_guide_is_in_the_navigation_once(pages: Pages) -> None:
    guides = sorted(place for place in pages.texts if place.startswith("how-to/") and place != HOW_TO)
    listed = [target.removeprefix("/") for target in links(pages.texts[HOW_TO].partition("\n## ")[2])]
    assert sorted(listed) == guides, "docs/how-to/README.md lists every how-to page under a heading"


@pytest.mark.slow
def test_every_page_but_sources_is_in_the_navigation(pages: Pages) -> None:
    text = configuration(pages, sources.ROOT / "src")
    missing = [place for place in pages.texts if f'"{place}"' not in text and not place.startswith("source/")]
    assert not missing


@pytest.mark.slow
def test_every_name_of_what_was_collected_has_a_page(pages: Pages) -> None:
    for kind in KINDS:
        for name in registry.names(kind):
            assert title(pages.texts[f"reference/blocks/{kind}/{name}.md"]) == f"{kind}/{name}"
    assert all(f"reference/commands/{name}.md" in pages.texts for name in commands())
    assert all(f"reference/interface/{name}.md" in pages.texts for name in read_stub(STUB))
    assert all(f"reference/presets/{name}.md" in pages.texts for name in PRESETS)


@pytest.mark.slow
def test_page_of_a_block_has_its_parts(pages: Pages) -> None:
    page = pages.texts["reference/blocks/attention/mla.md"]
    assert "arxiv.org/abs/2405.04434" in page and "| `kv_lora_rank` | `int ≥ 1 \\| None` | `null` |" in page
    assert "| numbers in the cache, a token | 72 |" in page and "| ✓ | decodes by cache |" in page
    assert "/reference/presets/deepseek_v2.md" in page
    drawn = ET.fromstring(str(pages.files["reference/blocks/attention/mla.svg"]))
    assert any("latent 64 + 8" in text for text in drawn.itertext())


@pytest.mark.slow
def test_page_of_a_preset_has_the_figures_of_describe(pages: Pages) -> None:
    page = pages.texts["reference/presets/deepseek_v2.md"]
    assert "| parameters | 235,741,434,880 |" in page and "| cache, bytes a token in bf16 | 69,120 |" in page
    assert presets.find("deepseek_v2").file.read_text().strip() in page
    assert "/reference/blocks/gating/group_limited.md" in page


@pytest.mark.slow
def test_page_of_a_command_has_its_help_and_the_documents_that_use_it(pages: Pages) -> None:
    page = pages.texts["reference/commands/sweep.md"]
    assert "resume" in page and "--workers" in page and "/how-to/sweep.md" in page


@pytest.mark.slow
def test_command_that_no_document_uses_is_not_among_its_readers(pages: Pages) -> None:
    assert "/how-to/sweep.md" not in pages.texts["reference/commands/import.md"]


# --- papers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Ainslie et al. 2023, arXiv 2305.13245: y", "Ainslie et al. 2023"),
        ("A rule. DeepSeek-AI 2024 (DeepSeek-V2), arXiv 2305.13245, §2.1", "DeepSeek-AI 2024 (DeepSeek-V2)"),
        ("x; mHC,\narXiv 2305.13245; y", "mHC"),
        ("no other bound: both dual clipping (arXiv 2305.13245)", ""),
        ("arXiv 2305.13245", ""),
    ],
)
def test_paper_is_called_what_stands_before_its_number(text: str, name: str) -> None:
    assert list(papers.cited(text)) == [(name, "2305.13245")]


@pytest.mark.slow
def test_papers_lead_to_blocks_and_presets(pages: Pages) -> None:
    (row,) = [line for line in pages.texts[papers.PLACE].splitlines() if "2405.04434" in line]
    assert "DeepSeek-AI 2024" in row and "/reference/blocks/attention/mla.md" in row and "presets/deepseek_v2.md" in row


@pytest.mark.slow
def test_every_paper_has_a_name(pages: Pages) -> None:
    rows = re.findall(r"^\| \[([\d.]+)\].*? \| (.*?) \|", pages.texts[papers.PLACE], re.M)
    assert len(rows) > 90 and not [number for number, name in rows if not name]


# --- a newcomer's questions -------------------------------------------------------------------------------------------

ANSWERS = {
    "How do I add a block?": ("how-to/add-a-block.md", r"@register\("),
    "What is MLA's cache?": ("reference/blocks/attention/mla.md", r"numbers in the cache, a token \| 72"),
    "Which command resumes a sweep?": ("reference/commands/sweep.md", "resume: run what is unfinished"),
    "What does this refusal mean?": ("reference/refusals.md", "`remedy:`"),
    "Which papers are in it?": ("reference/papers.md", "2405.04434"),
    "How do I draw my own YAML?": ("how-to/draw.md", r"blockwright draw mine\.yaml"),
    "How do I add a picture for my plug-in's block?": ("how-to/add-a-block.md", "### How it is drawn"),
    "What does a preset cost at a context of 32k?": ("how-to/cost-card.md", "context=32768"),
    "How do I compare two models or two runs?": ("how-to/diff.md", "blockwright diff logs/train/runs/A"),
    "How do I change a block by clicking, and train it?": ("how-to/studio.md", "for `blockwright train model=file"),
}


@pytest.mark.slow
def test_questions_of_a_newcomer_are_on_the_first_page(pages: Pages) -> None:
    asked = re.findall(r"^\| (.+\?) \|", pages.texts["index.md"], re.M)
    assert asked == list(ANSWERS)


@pytest.mark.slow
@pytest.mark.parametrize("question", ANSWERS)
def test_answer_is_two_clicks_away(question: str, pages: Pages) -> None:
    place, answer = ANSWERS[question]
    (row,) = [line for line in pages.texts["index.md"].splitlines() if line.startswith(f"| {question}")]
    near = {target.removeprefix("/") for target in links(row)}
    beyond = {target.removeprefix("/") for first in near for target in links(pages.texts[first])}
    assert place in near | beyond and re.search(answer, pages.texts[place])


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_written_links_are_relative_and_lead_to_files(pages: Pages, tmp_path: Path) -> None:
    write(pages, tmp_path)
    page = tmp_path / "pages" / "reference" / "blocks" / "attention" / "mla.md"
    targets = links(page.read_text())
    assert not [target for target in targets if target.startswith("/")]
    near = ["mla.svg", "index.md", "../../presets/deepseek_v2.md"]
    assert set(near) <= set(targets) and all((page.parent / target).is_file() for target in near)


def test_pages_of_an_earlier_build_are_removed(tmp_path: Path) -> None:
    (tmp_path / "old.md").write_text("old")
    Pages({"new.md": "[a](/b/c.md)"}, {"d.svg": "<svg/>"}).write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new.md", "d.svg"}
    assert (tmp_path / "new.md").read_text() == "[a](b/c.md)"


def test_two_pages_of_one_place_are_an_error() -> None:
    pages = Pages()
    pages.add("a.md", "# a")
    with pytest.raises(ValueError, match=r"a\.md"):
        pages.add("a.md", "# b")
