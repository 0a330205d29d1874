"""Links, docstrings and the builder's dialect."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from docs.site.markdown import fence, for_builder, links, prose, relative, relinked, title


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


@pytest.mark.parametrize(
    ("place", "page", "expected"),
    [
        ("reference/blocks/norm/index.md", "index.md", "reference/blocks/norm/index.md"),
        ("index.md", "reference/blocks/norm/none.md", "../../../index.md"),
        ("how-to/sweep.md#jobs", "how-to/ablate.md", "sweep.md#jobs"),
    ],
)
def test_path_of_a_page_seen_from_another(place: str, page: str, expected: str) -> None:
    assert relative(place, page) == expected


@pytest.mark.parametrize(
    "docstring",
    [
        "y = W_o [softmax(q_n k_nᵀ) v_n]_n, a * b * c < 3 & d",
        "S ← Σ_{j ≤ l} *_x [a](b) __c__ <img> a_b_c",
    ],
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


# --- the builder's dialect, by Python-Markdown itself ----------------------------------------------------------------

python_markdown = pytest.importorskip("markdown", reason="needs the extra site, which brings Python-Markdown")


def rendered(text: str) -> str:
    return python_markdown.markdown(for_builder(text), extensions=["tables", "fenced_code"])


def test_list_after_a_line_of_text_is_a_list() -> None:
    text = "Reading them\n* runs none of\n  their code\n* writes nothing\n\n1. one\n2. two"
    assert rendered(text).count("<li>") == 4 == MarkdownIt().render(text).count("<li>")
    assert "<li>" not in python_markdown.markdown("Reading them\n* runs none")  # else the step is not needed


def test_bars_in_the_code_of_a_table_are_bars() -> None:
    assert "<code>int | None</code>" in rendered("| a | b |\n|---|---|\n| `int \\| None` | c |")


def test_code_is_left_alone() -> None:
    text = "```bash\nblockwright x\n* y\n| `a \\| b` |\n```"
    assert for_builder(text) == text
