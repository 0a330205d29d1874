"""The pages before they are built: every document has a place, its links lead to pages, refusals are as printed."""

from __future__ import annotations

import inspect
import re
import shlex
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from markdown_it import MarkdownIt

from blockwright import registry
from blockwright.command import run
from blockwright.commands import commands
from blockwright.lazy import read_stub
from blockwright.registry import presets
from blockwright.registry.command import run_command
from docs.site import papers, sources
from docs.site.__main__ import collect, write
from docs.site.markdown import Pages, fence, for_builder, links, prose, relative, relinked, title
from docs.site.navigation import HOW_TO, configuration

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
def test_every_page_but_sources_is_in_the_navigation_and_every_guide_once(pages: Pages) -> None:
    guides = sorted(place for place in pages.texts if place.startswith("how-to/") and place != HOW_TO)
    listed = [target.removeprefix("/") for target in links(pages.texts[HOW_TO].partition("\n## ")[2])]
    assert sorted(listed) == guides, "docs/how-to/README.md lists every how-to page under a heading"
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
def test_pages_have_the_figures_and_links_of_what_they_are_of(pages: Pages) -> None:
    page = pages.texts["reference/blocks/attention/mla.md"]
    assert "arxiv.org/abs/2405.04434" in page and "| `kv_lora_rank` | `int ≥ 1 \\| None` | `null` |" in page
    assert "| numbers in the cache, a token | 72 |" in page and "/reference/presets/deepseek_v2.md" in page
    drawn = ET.fromstring(str(pages.files["reference/blocks/attention/mla.svg"]))
    assert any("latent 64 + 8" in text for text in drawn.itertext())
    page = pages.texts["reference/presets/deepseek_v2.md"]
    assert "| parameters | 235,741,434,880 |" in page and "| cache, bytes a token in bf16 | 69,120 |" in page
    assert presets.find("deepseek_v2").file.read_text().strip() in page
    page = pages.texts["reference/commands/sweep.md"]
    assert "--workers" in page and "/how-to/sweep.md" in page
    assert "/how-to/sweep.md" not in pages.texts["reference/commands/import.md"]


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


def test_every_paper_of_a_block_has_a_name() -> None:
    names: dict[str, list[str]] = {}
    for kind in registry.kinds():
        for block in registry.names(kind):
            for name, number in papers.cited(inspect.getdoc(registry.lookup(kind, block).cls) or ""):
                names.setdefault(number, []).append(name)
    assert len(names) > 90 and not [number for number, called in names.items() if not any(called)]


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


def test_links_are_changed_and_code_and_addresses_are_not() -> None:
    text = "[a](x.md#b) ![p](p.svg) `f[a](x.md)` [`c`](y.md)\n```\n[d](z.md)\n```\n[e](https://a.b/x.md) [f](#g)"
    changed = relinked(text, lambda target: f"<{target}>")
    assert changed == (
        "[a](<x.md#b>) ![p](<p.svg>) `f[a](x.md)` [`c`](<y.md>)\n```\n[d](z.md)\n```\n[e](https://a.b/x.md) [f](#g)"
    )
    assert links(text) == ["x.md#b", "p.svg", "y.md"]
    assert links('<img src="docs/a.svg" width="5">') == ["docs/a.svg"]


def test_tick_without_a_partner_hides_no_link() -> None:
    assert links("| a ` b | [c](c.md) |\n| d ` e | [f](f.md) |") == ["c.md", "f.md"]


def test_path_of_a_page_seen_from_another() -> None:
    assert relative("reference/blocks/norm/index.md", "index.md") == "reference/blocks/norm/index.md"
    assert relative("index.md", "reference/blocks/norm/none.md") == "../../../index.md"
    assert relative("how-to/sweep.md#jobs", "how-to/ablate.md") == "sweep.md#jobs"


@pytest.mark.parametrize(
    "docstring", ["y = W_o [softmax(q_n k_nᵀ) v_n]_n, a * b * c < 3 & d", "S ← Σ_{j ≤ l} *_x [a](b) __c__ <img> a_b_c"]
)
def test_formula_is_shown_as_it_is_written(docstring: str) -> None:
    (paragraph,) = [token for token in MarkdownIt().parse(prose(docstring)) if token.type == "inline"]
    assert "".join(child.content for child in paragraph.children or []) == docstring


def test_code_and_lists_of_a_docstring_stay() -> None:
    rendered = MarkdownIt().render(prose("``a_b`` is [c]:\n\n* one_x ``d``\n* arXiv 2405.04434"))
    assert "<code>a_b</code> is [c]" in rendered and rendered.count("<li>") == 2
    assert 'href="https://arxiv.org/abs/2405.04434"' in rendered


def test_fence_is_longer_than_any_inside() -> None:
    assert fence("```\na\n```", "text").splitlines()[0] == "````text"


def test_title_has_no_marks() -> None:
    assert title("text\n\n# a\\_b `c`\n") == "a_b c"


def rendered(text: str) -> str:
    """By the builder's Python-Markdown itself."""
    python_markdown = pytest.importorskip("markdown", reason="needs the extra site, which brings Python-Markdown")
    return python_markdown.markdown(for_builder(text), extensions=["tables", "fenced_code"])


def test_list_after_a_line_of_text_is_a_list() -> None:
    text = "Reading them\n* runs none of\n  their code\n* writes nothing\n\n1. one\n2. two"
    assert rendered(text).count("<li>") == 4 == MarkdownIt().render(text).count("<li>")


def test_bars_in_the_code_of_a_table_are_bars() -> None:
    assert "<code>int | None</code>" in rendered("| a | b |\n|---|---|\n| `int \\| None` | c |")


def test_code_is_left_alone() -> None:
    text = "```bash\nblockwright x\n* y\n| `a \\| b` |\n```"
    assert for_builder(text) == text


PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "refusals.md"

EXAMPLES = re.findall(r"```console\n\$ blockwright (.+)\n((?:.+\n)+?)```", PAGE.read_text())

assert len(EXAMPLES) >= 5


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_refusal_is_what_the_page_shows(command: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(run, shlex.split(command)) == 64
    printed = capsys.readouterr().err
    assert re.fullmatch(".*".join(map(re.escape, shown.split("…"))), printed), printed
