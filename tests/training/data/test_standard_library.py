"""The standard library as a corpus: source files of the interpreter, without its tests and installed packages."""

from __future__ import annotations

from itertools import islice

import pytest

from blockwright.training.data.corpus import SPLITS
from blockwright.training.data.standard_library import StandardLibrary


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
