"""A kubectl of a scripted cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the scripted kubectl first on PATH; the folder of its cluster."""
    program, cluster = tmp_path / "bin" / "kubectl", tmp_path / "cluster"
    program.parent.mkdir()
    script = Path(__file__).with_name("scripted_cluster.py")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {script} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SCRIPTED_CLUSTER", str(cluster))
    return cluster
