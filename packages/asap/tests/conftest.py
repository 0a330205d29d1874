"""What the tests share: the reference, and rollouts of a policy that is hardly trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blockwright_asap.study import Settings, Study
from small_study import SMALL


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"), Settings(**SMALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "study"
