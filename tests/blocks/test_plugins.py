"""A checkpoint names the distributions of its plug-in blocks, and is refused where they are missing."""

from __future__ import annotations

import pytest

from blockwright import registry
from blockwright.blocks.checkpoint import read
from blockwright.blocks.norm import RMSNorm
from blockwright.registry import ConfigError
from tests.blocks.small import Make


def test_plugins_of_a_model_are_named_and_checked_with_where_they_come_from(temporary_blocks: None, tiny: Make) -> None:
    assert read.distributions(tiny(moe=True)) == {}  # built-in blocks need none
    registry.register("norm", "strange_norm")(type("StrangeNorm", (RMSNorm,), {"__module__": "foreign_norms.norms"}))
    found = read.distributions(tiny(norm="strange_norm"))
    assert found == {"foreign_norms": {"version": None, "blocks": ["norm/strange_norm"]}}
    read.check_packages(found, "x.ckpt")
    read.check_packages(None, "x.ckpt")  # an older checkpoint names none


def test_missing_plugin_is_refused_with_the_distribution_to_install() -> None:
    with pytest.raises(ConfigError) as caught:
        read.check_packages({"foreign_norms": {"version": "1.2", "blocks": ["norm/strange_norm"]}}, "x.ckpt")
    assert caught.value.value == "x.ckpt" and "norm/strange_norm of foreign_norms 1.2" in caught.value.rule
    assert "pip install 'foreign_norms==1.2'" in caught.value.remedy
