"""The tree of a configuration: whole, in its order, on the screen only where it is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from blockwright.training.configuration import config_tree


def test_tree_holds_each_setting_once_and_others_after_the_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, Any] = {"seed": 3, "mine": {"deep": {"er": 2}}, **{name: {"x": 1} for name in config_tree.PARTS}}
    plain["callbacks"] = {}
    config_tree.show(plain, tmp_path, print_config=False)
    saved = (tmp_path / "config_tree.log").read_text()
    assert re.findall(r"^[├└]── (\w+)", saved, re.M) == [*config_tree.PARTS, "seed", "mine"]
    assert "── callbacks: {}" in saved and "── er: 2" in saved and saved.count("── x: 1") == len(config_tree.PARTS) - 1
    assert capsys.readouterr().out == f"Configuration: {tmp_path / 'config_tree.log'}\n"
    config_tree.show(plain, tmp_path, print_config=True)
    printed = capsys.readouterr().out
    assert "── er: 2" in printed and "Configuration:" not in printed
