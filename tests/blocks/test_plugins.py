"""A checkpoint names the distributions of its plug-in blocks, and is refused where they are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from blockwright import registry
from blockwright.blocks import plugins
from blockwright.blocks.norm.rmsnorm import RMSNorm
from blockwright.registry import ConfigError


@pytest.fixture
def with_plugin(temporary_blocks: None, tiny: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A model with a norm of a plug-in."""
    registry.register("norm", "strange_norm")(type("StrangeNorm", (RMSNorm,), {"__module__": "foreign_norms.norms"}))
    return tiny(norm="strange_norm")


def test_plugins_are_named_with_where_they_come_from(with_plugin: dict[str, Any]) -> None:
    assert plugins.distributions(with_plugin) == {"foreign_norms": {"version": None, "blocks": ["norm/strange_norm"]}}


def test_built_in_blocks_need_no_distribution(tiny: Callable[..., dict[str, Any]]) -> None:
    assert plugins.distributions(tiny(moe=True)) == {}


def test_checkpoint_is_read_where_its_plugins_are(with_plugin: dict[str, Any]) -> None:
    plugins.check(plugins.distributions(with_plugin), "x.ckpt")


def test_missing_plugin_is_refused_with_the_distribution_to_install() -> None:
    told = {"foreign_norms": {"version": "1.2", "blocks": ["norm/strange_norm"]}}
    with pytest.raises(ConfigError) as caught:
        plugins.check(told, "x.ckpt")
    assert caught.value.value == "x.ckpt" and "norm/strange_norm of foreign_norms 1.2" in caught.value.rule
    assert "pip install 'foreign_norms==1.2'" in caught.value.remedy


def test_older_checkpoint_names_none() -> None:
    plugins.check(None, "x.ckpt")
