"""The kernel's documentation as a corpus, on a folder of a few pages: plain and compressed, and its refusals."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from blockwright.registry.errors import ConfigError
from blockwright.training.data.corpus import SPLITS
from blockwright.training.data.kernel_documentation import KernelDocumentation

PAGES = [f"Page {i}\n======\n\nA lock, in prose ä.\n" for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mm").mkdir()
    for i, page in enumerate(PAGES):
        if i % 2:
            (tmp_path / f"{i:02}.rst").write_text(page)
        else:
            (tmp_path / "mm" / f"{i:02}.rst.gz").write_bytes(gzip.compress(page.encode()))
    (tmp_path / "ignored.rst.exceptions").write_text("no page")
    return tmp_path


def test_each_page_is_a_document_of_one_split(folder):
    corpus = KernelDocumentation(str(folder))
    corpus.check()
    splits = {split: [*corpus.documents(split)] for split in SPLITS}
    assert sorted(page for pages in splits.values() for page in pages) == sorted(PAGES)
    assert [len(splits[split]) for split in SPLITS] == [36, 2, 2]


def test_its_fingerprint_is_of_the_contents(folder, tmp_path):
    before = KernelDocumentation(str(folder)).fingerprint()
    moved = folder.rename(tmp_path.with_name("moved"))
    assert KernelDocumentation(str(moved)).fingerprint() == before
    (moved / "01.rst").write_text("Another page\n")
    assert KernelDocumentation(str(moved)).fingerprint() != before


def refused(folder: str, work=KernelDocumentation.check) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        work(KernelDocumentation(folder))
    assert error.value.path == "data.corpus.folder" and error.value.remedy
    return error.value


def test_a_missing_package_is_refused(tmp_path):
    (tmp_path / "one.rst").write_text("A page\n")
    for folder in (str(tmp_path / "no"), str(tmp_path), "/"):
        refused(folder)


BROKEN = {"cut off": gzip.compress(PAGES[0].encode())[:-9], "no gzip": b"no gzip", "no text": gzip.compress(b"\xff")}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_page_is_refused_by_name(folder, content):
    (folder / "mm" / "02.rst.gz").write_bytes(content)
    error = refused(str(folder), lambda corpus: [[*corpus.documents(split)] for split in SPLITS])
    assert error.value.endswith("02.rst.gz")
