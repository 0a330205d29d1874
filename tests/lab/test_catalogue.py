"""The catalogue's page: current, of this distribution only, and ticked by probes that can fail."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.grouped import GQA
from blockwright.lab import abilities, catalogue
from blockwright.lab.abilities import host
from blockwright.lab.catalogue import PAGE, REMEDY, builtin, described, main, papers, stale, table, told
from blockwright.registry import ConfigError, presets, register


@pytest.mark.slow
def test_page_is_current():
    fault = stale()
    assert fault is None, fault


def test_pages_hold_blocks_of_this_distribution_and_their_papers():
    sections = dict(re.findall(r"^## (\w+)\n\n(.*?)(?=\n## |\Z)", PAGE.read_text(), re.M | re.S))
    for kind in filter(builtin, registry.kinds()):
        assert re.findall(r"^\| `(\w+)`", sections[kind], re.M) == builtin(kind), REMEDY
        rows = sections[kind].splitlines()[2:]
        for name, row in zip(builtin(kind), rows, strict=True):
            assert row.startswith(table(told(kind, name), [])[0]), REMEDY
    models = sections["Models"].splitlines()[2:]
    for name, row in zip(presets.names(), models, strict=True):
        assert row.startswith(table([f"`{name}`", described(name)], [])[0]), REMEDY

    class Block:
        """A block.

        Wang & Komatsuzaki 2021; Thinking Machines 2026; YOCO, Xiong et al. 2020, arXiv 2002.04745,
        §2: y = x. Again arXiv 2002.04745.

        Args:
            alpha: as Noether 1999, arXiv 9999.99999
        """

    link = "[2002.04745](https://arxiv.org/abs/2002.04745)"
    assert papers(Block) == f"Wang & Komatsuzaki 2021, Thinking Machines 2026, Xiong et al. 2020, {link}"


@pytest.mark.usefixtures("temporary_blocks")
def test_blocks_of_plug_ins_are_left_out():
    register("norm", "plugin_norm")(type("PluginNorm", (registry.lookup("norm", "rmsnorm").cls,), {}))
    assert "plugin_norm" in registry.names("norm") and "plugin_norm" not in builtin("norm")


def of_all(x):
    return x.mean(1, keepdim=True)


BROKEN = {  # what is done instead, and the ticks that are lost
    "sees the whole sequence": (
        {"forward": lambda self, x, given: GQA.forward(self, x, given) + of_all(x)},
        {"causal", "causal in training", "decodes by cache", "packs"},
    ),
    "sees it while it trains": (
        {"forward": lambda self, x, given: GQA.forward(self, x, given) + of_all(x) * self.training},
        {"causal in training"},
    ),
    "has no cache": ({"new_cache": Attention.new_cache}, {"decodes by cache"}),
    "turns nothing": (
        {"forward": lambda self, x, of: GQA.forward(self, x, of._replace(positions=torch.zeros_like(of.positions)))},
        {"uses position"},
    ),
    "ignores documents": (
        {"forward": lambda self, x, given: GQA.forward(self, x, given._replace(segments=None))},
        {"packs"},
    ),
    "decodes each token as the first": (
        {"forward": lambda self, x, given: GQA.forward(self, x, given._replace(cache=None))},
        {"decodes by cache"},
    ),
}


@pytest.mark.usefixtures("temporary_blocks")
@pytest.mark.parametrize("case", BROKEN)
def test_attention_that_cannot_do_a_thing_gets_no_tick_for_it(case):
    changes, lost = BROKEN[case]
    register("attention", "broken")(type("Broken", (GQA,), changes))
    assert unticked("attention", "broken") == lost


def unticked(kind, name):
    return {tick for tick, asked in abilities.ABILITIES[kind].items() if not asked(host(kind, name)[0])}


@pytest.mark.slow
def test_ticks_of_gates_are_those_of_what_they_do():
    assert unticked("gating", "softmax_topk") == {"adds a loss", "adapts"}
    assert unticked("gating", "sigmoid_bias") == {"adds a loss"}
    assert unticked("balance", "expert") == set()
    assert unticked("ffn", "swiglu") == {"routes"}
    assert unticked("position", "none") == {"tells the order"}


def test_token_that_no_expert_takes_is_seen():
    decoder, gate = host("gating", "softmax_topk")
    forward = type(gate).forward

    class Losing(nn.Module):
        def forward(self, *arguments: Any) -> Any:
            routing = forward(gate, *arguments)
            lost = torch.full_like(routing.experts[:, -1:], len(routing.load))
            return routing._replace(experts=torch.cat((routing.experts[:, :-1], lost), 1))

    assert abilities.complete(decoder)

    class Still(nn.Module):
        def forward(self, x: Tensor, routing: Any) -> Tensor:
            return x

    ffn = decoder.layers[0].ffn
    ffn.gating, ffn.experts = Losing(), Still()
    assert not abilities.complete(decoder)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page in a folder of its own, of which the code now says two lines."""
    monkeypatch.setattr(catalogue, "PAGE", tmp_path / "catalogue.md")
    monkeypatch.setattr(catalogue, "markdown", lambda: "first\nsecond\n")
    return tmp_path / "catalogue.md"


def test_check_passes_a_current_page_and_tells_how_to_mend_another(page, capsys):
    page.write_text("first\nsecond\n")
    assert main(["--check"]) == 0
    page.write_text("first\nother\n")
    assert main(["--check"]) == 1
    told = capsys.readouterr().err
    assert REMEDY in told and "other" in told and "second" in told
    page.unlink()
    assert main(["--check"]) == 1
    assert main([]) == 0 and capsys.readouterr().out.endswith("first\nsecond\n")
    with pytest.raises(ConfigError):
        main(["--chek"])
